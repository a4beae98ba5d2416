"""Model folders of others: what a config.json may ask for, and how many parameters its weights can hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emd_fast.io import reading

_CODE = ("auto_map", "quantization_config")  # keys that make loaders look for other code
_LARGEST, _LONGEST, _DEEPEST = 2**20, 64, 256  # a size; a list of blocks; layers in a block
_DEPTHS = ("layer", "depth", "block", "num_heads")


def check_folder(folder: Path, build: Callable[[dict[str, Any]], nn.Module]) -> None:
    """Whether a folder with config.json and weights can be loaded in bounded time and memory.

    Args:
        build: the network of a configuration. It is called under the meta device, without memory.

    Raises:
        ValueError: files of another kind, a configuration that is not supported, or one of more
            parameters than the files have bytes. OSError: a file cannot be read.
    """
    reading.check_regular(folder)
    config = reading.read_json(folder / "config.json")
    check_config(config)
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    with torch.device("meta"):
        needed = sum(parameter.numel() for parameter in build(config).parameters())
    if needed > size:
        raise ValueError(f"its configuration is of {needed:,} parameters, the files have {size:,} bytes")


def check_loaded(found: Mapping[str, Any]) -> None:
    """Whether a loader found every weight.

    Raises:
        ValueError: weights are missing or of another shape.
    """
    if missing := sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"]))):
        raise ValueError(f"{missing[0][:100]} is missing or does not fit, and {len(missing) - 1} more")


def check_config(config: object) -> None:
    """Whether a model can be built from a config.json in bounded time.

    Raises:
        ValueError: no table, a key that names other code, a size or a list that no network has.
    """
    if not isinstance(config, Mapping):
        raise ValueError("config.json must hold a table")
    for key in _CODE:
        if config.get(key) is not None:
            raise ValueError(f"its configuration has {key}, which is not supported")
    for key, value in config.items():
        _check_value(str(key)[:100], value)


def _check_value(key: str, value: Any) -> None:
    if isinstance(value, (list, tuple)):
        if len(value) > _LONGEST and not all(type(item) is float for item in value):
            raise ValueError(f"its configuration has {len(value):,} values for {key}, at most {_LONGEST} are supported")
        for item in value:
            _check_value(key, item)
    elif isinstance(value, Mapping):
        for inner, item in value.items():
            _check_value(str(inner)[:100], item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        most = _DEEPEST if any(word in key for word in _DEPTHS) and "channels" not in key else _LARGEST
        if not -most <= value <= most:
            raise ValueError(f"its configuration has {key} = {value:.4g}, at most {most:,} is supported")
