"""A model from files of others: sizes are bounded by the files, and every weight fits."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emd_fast.config import ConfigError
from emd_fast.io import models, reading, tensors
from emd_fast.io.reading import shown
from emd_fast.teachers.diffusers import files
from emd_fast.teachers.diffusers.single_file import Part

# Kind of a default -> kinds of values that may stand in its place. Some defaults are 1 where floats are meant.
_KINDS: dict[type, tuple[type, ...]] = {
    bool: (bool, type(None), list, tuple),
    int: (int, float, list, tuple),
    float: (int, float),
    str: (str,),
}


def load(kind: Any, folder: Path, dtype: torch.dtype = torch.float32, part: Part | None = None) -> nn.Module:
    """The model in a folder with config.json and weights, or with the weights in a single file.

    `files.find` says which files are read. A `.bin` is read by torch.load with weights_only=True, which is
    what diffusers does.

    Args:
        kind: a model class of diffusers.
        folder: its folder.
        dtype: of its weights.
        part: has the weights instead of the folder.

    Raises:
        ConfigError: files of another kind, sizes that the weights do not have, or weights that do not
            fit the configuration.
    """

    build = functools.partial(_built, kind)
    if part is not None:
        return _from_file(kind, folder, build, part, dtype)
    return _loaded(kind, folder, build, files.DIFFUSERS, **quietly(), torch_dtype=dtype)


def on_meta(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model that the config.json in a folder describes, on the meta device. No weights are read.

    Raises:
        ConfigError: a configuration that is not supported.
    """
    try:
        config = reading.read_json(folder / "config.json")
        models.check_config(config)
        with torch.device("meta"), models.silenced():
            return _built(kind, config).to(dtype)
    except Exception as error:  # constructors raise exceptions of many kinds
        raise ConfigError(f"cannot read {folder / 'config.json'}: {reading.reason(error)}") from error


def _built(kind: Any, config: dict[str, Any]) -> nn.Module:
    check_kinds(kind, config)
    model: nn.Module = kind.from_config({key: config[key] for key in config if key != "_class_name"})
    return model


def check_kinds(kind: Any, config: dict[str, Any]) -> None:
    """Whether the values of a configuration are of the kinds of the defaults of its class.

    A network may be built with others, and fail in its first pass.

    Raises:
        ValueError: one is not.
    """
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        default, value = parameter.default, config.get(name, parameter.default)
        optional = (
            name == "sample_size" or "None" in str(parameter.annotation) or "Optional" in str(parameter.annotation)
        )
        if value is None and optional:
            continue
        if type(default) in _KINDS and type(value) not in _KINDS[type(default)]:
            raise ValueError(
                f"its configuration has {name} = {shown(value)} where one like {shown(default)} is expected"
            )


def load_encoder(kind: Any, folder: Path, part: Part | None = None) -> nn.Module:
    """The float32 text encoder in a folder, a model class of transformers. Raises as `load` does."""

    def build(config: dict[str, Any]) -> nn.Module:
        model: nn.Module = kind(kind.config_class.from_dict(config))
        return model

    if part is not None:
        return _from_file(kind, folder, build, part, torch.float32).eval()
    return _loaded(kind, folder, build, files.TRANSFORMERS, trust_remote_code=False, dtype=torch.float32).eval()


def _loaded(
    kind: Any, folder: Path, build: Callable[[dict[str, Any]], nn.Module], stems: tuple[str, str], **options: Any
) -> nn.Module:
    try:
        found_files = files.find(folder, stems)
        options |= found_files.options
        models.check_folder(folder, build)
        tensors.check(tensors.shards(found_files.file))
        with models.silenced():
            # Shapes are checked below, where all of them are known.
            model, found = kind.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except ConfigError:
        raise
    except Exception as error:  # diffusers and transformers raise exceptions of many kinds
        # What diffusers goes on to say is advice on arguments that nobody has here.
        said = reading.reason(error).partition(" If you want to")[0].replace("Cannot load  because ", "")
        raise ConfigError(f"cannot read the weights in {folder}: {said}") from error
    try:
        models.check_loaded(model, found)
    except ValueError as error:
        raise ConfigError(f"the weights in {folder} do not fit its config.json: {error}") from None
    loaded: nn.Module = model
    return loaded


def _from_file(
    kind: Any, folder: Path, build: Callable[[dict[str, Any]], nn.Module], part: Part, dtype: torch.dtype
) -> nn.Module:
    try:
        config = reading.read_json(folder / "config.json")
        models.check_config(config)
        with models.silenced():
            return part.load(kind, config, build).to(dtype)
    except Exception as error:  # diffusers and transformers raise exceptions of many kinds
        said = " ".join(str(error).split())[:1000] if type(error) is ValueError else reading.reason(error)
        raise ConfigError(f"the weights in {part.file.path} do not fit {folder / 'config.json'}: {said}") from error


def quietly() -> dict[str, bool]:
    """diffusers reads without a second copy where accelerate is there, and says so at length where it is not."""
    return {"low_cpu_mem_usage": importlib.util.find_spec("accelerate") is not None}
