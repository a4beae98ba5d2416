"""Reads the text encoders of a pipeline folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from emd_fast.config import ConfigError
from emd_fast.io import models, reading
from emd_fast.teachers.diffusers import weights
from emd_fast.teachers.diffusers.architectures import Architecture
from emd_fast.teachers.diffusers.encoder import TextEncoder
from emd_fast.teachers.diffusers.index import TEXT_PARTS, class_of
from emd_fast.teachers.diffusers.single_file import Part

_InFile = Callable[[str], Part | None]
"""component -> its weights in a single file, if they are there."""


def text_parts(index: Mapping[str, Any], architecture: Architecture) -> dict[str, str]:
    """The text encoders and tokenizers of an index: component -> class of transformers.

    Raises:
        ValueError: a class that is not supported; without the path.
    """
    return {
        name: class_of(index, name, "transformers", _of(name.partition("_")[0], architecture.text))
        for name, value in index.items()
        if name.partition("_")[0] in TEXT_PARTS and isinstance(value, list) and value[1] is not None
    }


def _of(kind: str, classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes of tokenizers, or those of text encoders."""
    return tuple(name for name in classes if _is_tokenizer(name) == (kind == "tokenizer"))


def _is_tokenizer(name: str) -> bool:
    return "Tokenizer" in name or "Processor" in name  # a processor holds a tokenizer


def pipeline_class(index: Mapping[str, Any], architecture: Architecture) -> str:
    """The pipeline whose encode_prompt computes the conditions.

    Raises:
        ValueError: another pipeline, or a scheduler of another library; without the path.
    """
    import diffusers

    name = index.get("_class_name")
    if name not in architecture.pipelines:
        raise ValueError(f"its pipeline {name!r} is not supported: {', '.join(architecture.pipelines)} are")
    scheduler = index.get("scheduler")
    if isinstance(scheduler, list) and scheduler[1] is not None:
        class_of(index, "scheduler", "diffusers", tuple(kind for kind in dir(diffusers) if kind.endswith("Scheduler")))
    return str(name)


def classes(root: Path, index: Mapping[str, Any], architecture: Architecture) -> tuple[str, dict[str, str]]:
    """The class of the pipeline, and those of its text encoders and tokenizers.

    Raises:
        ConfigError: one is not supported.
    """
    try:
        return pipeline_class(index, architecture), text_parts(index, architecture)
    except ValueError as error:
        raise ConfigError(f"cannot use the pipeline in {root}: {error}") from None


def read(
    root: Path,
    index: Mapping[str, Any],
    architecture: Architecture,
    constants: Mapping[str, Any],
    model: nn.Module,
    in_file: _InFile,
) -> TextEncoder:
    """Reads the text encoders of a pipeline folder, onto the device of the network.

    The folder needs no model_index.json.

    Args:
        root: the folder. index: components of its pipeline.
        architecture, model: the network and how it is called.
        constants: tensors of the condition that do not depend on the prompt, by name.
        in_file: component -> its weights in a single file, if they are there.

    Raises:
        ConfigError: classes that are not supported, or weights that do not fit.
    """
    import diffusers

    name, parts = classes(root, index, architecture)
    device = next(model.parameters()).device
    loaded = {part: _loaded(root / part, kind, in_file(part)) for part, kind in parts.items()}
    for part in loaded.values():
        if isinstance(part, nn.Module):
            part.to(device)
    kind = getattr(diffusers, name)
    # Parts that encode no text are left out. Only Stable Diffusion 3 asks its network for sizes.
    expected = {part: None for part in inspect.signature(kind).parameters if part != "requires_safety_checker"}
    if architecture.component == "transformer":
        loaded[architecture.component] = model
    try:
        with models.silenced():
            pipeline = kind(**{**expected, **loaded})
        return TextEncoder(pipeline, architecture, constants, device, root)
    except ConfigError:
        raise
    except Exception as error:  # diffusers raises exceptions of many kinds
        raise ConfigError(f"cannot encode prompts with the components in {root}: {reading.reason(error)}") from error


def load(
    root: Path, index: Mapping[str, Any], architecture: Architecture, component: str, in_file: _InFile
) -> nn.Module:
    """Reads one text encoder. Raises as `read` does."""
    kind = classes(root, index, architecture)[1][component]
    encoder: nn.Module = _loaded(root / component, kind, in_file(component))
    return encoder


def _loaded(folder: Path, name: str, part: Part | None) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'text encoders need transformers: `pip install "emd_fast[diffusers]"`', name=error.name
        ) from error
    kind = getattr(transformers, name)
    if missing := getattr(kind, "_backends", ()):  # transformers puts a class without contents in its place
        raise ModuleNotFoundError(
            f"the {name} in {folder} needs {' and '.join(map(str, missing))}: install it", name=str(missing[0])
        )
    if not _is_tokenizer(name):
        return weights.load_encoder(kind, folder, part).requires_grad_(False)
    try:
        reading.check_regular(folder)
        return kind.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises exceptions of many kinds
        raise ConfigError(f"cannot read the tokenizer in {folder}: {reading.reason(error)}") from error
