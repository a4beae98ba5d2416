"""Weight files of others, looked at before a model is built from them: shards, names and dtypes."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from emd_fast.io import reading
from emd_fast.io.paths import is_part

# In the order in which transformers looks for them.
_TRANSFORMERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INTEGERS = ("I", "U", "B", "C")  # initials of safetensors' names of integers, booleans and complex numbers
_FLOATING = "BF16"  # begins with the initial of BOOL
COMPUTED = re.compile(r"(^|\.)position_ids$")
"""Buffers that older versions of transformers saved and newer ones compute."""
_COUNTS = re.compile(r"(^|\.)num_batches_tracked$")  # integers of batch norms, as in the VAE of Flux.2


def of_transformers(folder: Path) -> list[Path]:
    """The files that transformers reads the weights in a folder from. Raises as `shards` does."""
    return next((shards(folder / name) for name in _TRANSFORMERS if (folder / name).exists()), [])


def shards(path: Path) -> list[Path]:
    """The files that hold the tensors of a weight file: itself, or the shards of an index.

    Raises:
        ValueError: an index of another form, or one that names a file outside of its folder.
        OSError: it cannot be read.
    """
    if not path.name.endswith(".json"):
        return [path]
    table = reading.read_json(path)
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names or not isinstance(table.get("metadata", {}), dict):
        raise ValueError(f"{path.name} has no table weight_map of tensors and files: it is no index of shards")
    for name in names.values():
        if not is_part(name):
            raise ValueError(f"{path.name} names the file {reading.shown(name)}, which is none in its folder")
    return [path.with_name(name) for name in sorted(set(names.values()))]


def check(files: Iterable[Path]) -> None:
    """Whether files together hold each tensor once, in floating-point numbers.

    Loaders convert integers, booleans and complex numbers without a word, and take any of two
    tensors of one name.

    Raises:
        ValueError: they do not, or a file cannot be read. OSError: likewise.
    """
    places: dict[str, str] = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"there is no file {path.name}, which its index names")
        for name, dtype in _dtypes(path):
            if name in places:
                raise ValueError(f"{name[:120]} is in {places[name]} and in {path.name}: remove one of them")
            if dtype is not None and not COMPUTED.search(name) and not _COUNTS.search(name):
                raise ValueError(f"{name[:120]} in {path.name} is of {dtype}: give weights of floating-point numbers")
            places[name] = path.name


def _dtypes(path: Path) -> Iterator[tuple[str, str | None]]:
    """Names of the tensors in a file; the dtype of those that are not floating-point."""
    if path.suffix != ".safetensors":
        for name, value in _pickled(path).items():
            yield name, None if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no whole file of safetensors: {reading.reason(error)}") from None
    for name, kind in kinds.items():
        yield name, kind if kind.startswith(_INTEGERS) and kind != _FLOATING else None


def _pickled(path: Path) -> Mapping[str, Tensor]:
    try:
        # The archive of torch is mapped, not read.
        table = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        what = f"asks for {asked[1]}" if asked else "is damaged, or holds more than tensors"
        raise ValueError(f"{path.name} {what}: refused, nothing was run") from None
    except Exception as error:  # torch raises exceptions of many kinds
        raise ValueError(f"{path.name} is no whole file of torch.save: {reading.reason(error)}") from None
    if not isinstance(table, Mapping):
        raise ValueError(f"{path.name} holds a {type(table).__name__}, no table of tensors")
    for name, value in table.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path.name} holds {reading.shown(name)}, a {type(value).__name__} and no tensor")
    return table
