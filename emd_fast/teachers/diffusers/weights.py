"""A model of diffusers from a folder of others: sizes are bounded by its files, and no weight is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emd_fast.config import ConfigError
from emd_fast.io import reading
from emd_fast.teachers.diffusers import files
from emd_fast.teachers.diffusers.names import check_names, silenced

_CODE = ("auto_map", "quantization_config")  # keys that make loaders look for other code
_LARGEST, _LONGEST, _DEEPEST = 2**20, 64, 256  # a size; a list of blocks; layers in a block
_DEPTHS = ("layer", "depth", "block", "num_heads")


def load(kind: Any, folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in a folder with config.json and weights.

    `files.find` says which files are read. A `.bin` is read by torch.load with weights_only=True, which is
    what diffusers does.

    Args:
        kind: a model class of diffusers.
        folder: its folder.
        dtype: of its weights.

    Raises:
        ConfigError: files of another kind, sizes that the weights do not have, or weights that do not
            fit the configuration.
    """
    return _loaded(kind, folder, files.DIFFUSERS, **quietly(), torch_dtype=dtype)


def load_encoder(kind: Any, folder: Path) -> nn.Module:
    """The float32 text encoder in a folder, a model class of transformers. Raises as `load` does."""
    return _loaded(kind, folder, files.TRANSFORMERS, trust_remote_code=False, dtype=torch.float32)


def _loaded(kind: Any, folder: Path, stems: tuple[str, str], **options: Any) -> nn.Module:
    try:
        reading.check_regular(folder)
        config = reading.read_json(folder / "config.json")
        check_config(config)
        options |= files.find(folder, stems).options
        if hasattr(kind, "from_config"):
            sizes = [path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
            check_sizes(kind, config, sum(sizes))
        with silenced():
            model, found = kind.from_pretrained(
                folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:  # diffusers and transformers raise exceptions of many kinds
        # What diffusers goes on to say is advice on arguments that nobody has here.
        said = reading.reason(error).partition(" If you want to")[0].replace("Cannot load  because ", "")
        raise ConfigError(f"cannot read the weights in {folder}: {said}") from error
    check_names(folder, found)  # shapes are checked here, where all of them are known
    loaded: nn.Module = model
    return loaded


def quietly() -> dict[str, bool]:
    """diffusers reads without a second copy where accelerate is there, and says so at length where it is not."""
    return {"low_cpu_mem_usage": importlib.util.find_spec("accelerate") is not None}


def check_config(config: object) -> None:
    """Whether a model can be built from a config.json in bounded time.

    Raises:
        ConfigError: no table, a key that names other code, a size or a list that no network has.
    """
    if not isinstance(config, Mapping):
        raise ConfigError("config.json must hold a table")
    for key in _CODE:
        if config.get(key) is not None:
            raise ConfigError(f"its configuration has {key}, which is not supported")
    for key, value in config.items():
        _check_value(str(key)[:100], value)


def _check_value(key: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        if len(value) > _LONGEST and not all(type(item) is float for item in value):
            raise ConfigError(f"its configuration has {len(value):,} values for {key}, at most {_LONGEST} are allowed")
        for item in value:
            _check_value(key, item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        most = _DEEPEST if any(word in key for word in _DEPTHS) and "channels" not in key else _LARGEST
        if not -most <= value <= most:
            raise ConfigError(f"its configuration has {key} = {value:.4g}, at most {most:,} is supported")


def check_sizes(kind: Any, config: Mapping[str, Any], size: int) -> None:
    """Whether so many bytes can hold the weights of this configuration.

    Raises:
        ConfigError: they cannot; no memory was allocated for them.
    """
    with torch.device("meta"):
        model = kind.from_config({key: value for key, value in config.items() if key != "_class_name"})
    needed = sum(parameter.numel() for parameter in model.parameters())
    if needed > size:
        raise ConfigError(f"its configuration is of {needed:,} parameters, the files have {size:,} bytes")
