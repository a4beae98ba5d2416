"""What an exported generator says of itself, checked: it is data, and may come from anybody."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.export.one_step import Call, Metadata
from emd_fast.io.paths import is_part
from emd_fast.io.reading import parse_json, reason
from emd_fast.io.signed import json_of, table_of

VERSION = 1
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LARGEST = 2**28  # elements of a sample
_MOST_CALLS = 2**16


_LATER = {"rungs", "embedded_guidance"}  # keys that earlier releases did not write


def encoded(facts: Mapping[str, Any], indent: int | None = None) -> str:
    """Facts as JSON, with their SHA-256 in the last field."""
    return json_of({"version": VERSION, **facts}, indent)


def decoded(path: Path, content: str | bytes, names: set[str], indent: int | None = None) -> dict[str, Any]:
    """The facts that `encoded` wrote. Files of releases before 0.2 state no digests and are read without.

    Args:
        names: of the facts that must be there, besides "version" and "generator". "digests" may be there.

    Raises:
        ValueError: something else, a later version, or a damaged file. The message names `path`.
    """
    raw = content.encode() if isinstance(content, str) else content
    try:
        table = parse_json(raw)
    except ValueError as error:
        raise ValueError(f"{path} was not written by emd_fast.export: {reason(error)}") from None
    if not isinstance(table, dict) or "generator" not in table:
        raise ValueError(f"{path} was not written by emd_fast.export")
    if type(table.get("version")) is not int or table["version"] != VERSION:
        raise ValueError(f"{path} has format version {str(table.get('version'))[:20]}, this release reads {VERSION}")
    try:
        if "sha256" in table or "digests" in table:
            table = table_of(raw, indent)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {reason(error)}") from None
    if not names <= table.keys() <= names | {"version", "generator", "digests"}:
        raise ValueError(f"{path} is no generator of emd_fast.export: its facts are {', '.join(sorted(table))[:200]}")
    if not isinstance(table.get("digests", {}), dict):
        raise ValueError(f"{path} is no generator of emd_fast.export: its digests are of another form")
    return table


def table_of_metadata(metadata: Metadata) -> dict[str, Any]:
    """Metadata as facts. What a generator of earlier releases did not have is left out where it is not set."""
    table = dataclasses.asdict(metadata)
    return {name: value for name, value in table.items() if name not in _LATER or value not in (None, (), [])}


def metadata(path: Path, table: object) -> Metadata:
    """The metadata of a generator.

    Raises:
        ValueError: keys that are missing or unknown, or values of other types or outside their range.
    """
    names = {item.name for item in dataclasses.fields(Metadata)}
    if not isinstance(table, dict) or not names - _LATER <= table.keys() <= names:
        raise ValueError(f"{path} is no generator of emd_fast.export: its metadata has other keys")
    for name, value in table.items():
        if not _METADATA[name](value):
            raise ValueError(f"{path} is no generator of emd_fast.export: its {name} is {str(value)[:60]!r}")
    return Metadata(**table)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30


def _is_count(value: object, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _are_calls(value: object) -> bool:
    return (
        type(value) is list
        and 2 <= len(value) <= _MOST_CALLS
        and all(type(call) is list and len(call) == len(Call._fields) and all(map(_is_number, call)) for call in value)
    )


def _is_shape(value: object) -> bool:
    return (
        type(value) is list
        and 1 <= len(value) <= 4
        and all(type(size) is int and 0 < size <= _LARGEST for size in value)
        and math.prod(value) <= _LARGEST
    )


_METADATA: dict[str, Any] = {
    **dict.fromkeys(("c_skip", "c_out", "c_in", "c_noise", "input_scale"), _is_number),
    **dict.fromkeys(("sample_shape", "latent_shape"), _is_shape),
    "precision": lambda value: value in ("float32", "bfloat16"),
    "dtype": lambda value: type(value) is str and value in DTYPES,
    "seed": lambda value: _is_count(value, 2**63),
    "num_classes": lambda value: _is_count(value, 2**31),
    "steps": lambda value: _is_count(value, 2**62),
    "ema": lambda value: type(value) is bool,
    "t_star": lambda value: value is None or _is_number(value),
    "rungs": _are_calls,
    "embedded_guidance": _is_number,
}


def network(path: Path, table: object) -> tuple[str, dict[str, Any]]:
    """Class and configuration of a network.

    Raises:
        ValueError: another form.
    """
    match table:
        case {"class": str() as kind, "config": dict() as config, **others} if not others:
            return kind, config
    raise ValueError(f"{path} is no generator of emd_fast.export: it does not describe a network")


def check_own(path: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Bounds the arguments of a network of this project by the weights in the file.

    Raises:
        ValueError: an argument that is no number, or larger than any that these weights can belong to.
    """
    elements = sum(value.numel() for value in weights.values())
    for name, value in config.items():
        end = len(weights) if name == "layers" else elements
        if not _is_count(value, end + 1):
            raise ValueError(f"{path} is damaged: {name[:100]} is {str(value)[:60]!r} for {elements:,} weights")


def check_shapes(path: Path, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whether the weights are those of a network on the meta device.

    Raises:
        ValueError: a weight that is missing, unknown or of another shape.
    """
    wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(wanted.keys() ^ there.keys()) or sorted(name for name in wanted if wanted[name] != there[name]):
        raise ValueError(
            f"{path} is damaged: its weight {name[:100]} has shape {there.get(name)}, the network wants "
            f"{wanted.get(name)}"
        )


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of tensors on the CPU."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def digests_of(folder: Path, without: str) -> dict[str, str]:
    """SHA-256 of every file in a folder by its path there, without one name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != without:
            with open(path, "rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_new(out: Path) -> None:
    """Whether a folder can be written at `out`.

    Raises:
        ValueError: something is there, and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not empty: choose another folder")


def check_files(folder: Path, digests: Mapping[str, Any], without: str) -> None:
    """Whether the files of an exported folder are those that were written.

    Another file in a component, such as an index of shards, would be read in the place of one of
    them. Hidden files, and at the top those that are not JSON (README.md), are nobody's input.

    Raises:
        ValueError: one that is missing, damaged, no regular file, or not of the export.
    """
    for name, wanted in digests.items():
        if not all(map(is_part, name.split("/"))):
            raise ValueError(f"{folder} is damaged: it states a digest of {name[:100]!r}, which is no file in it")
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing, or no regular file")
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                raise ValueError(f"{path} is damaged: it does not have the SHA-256 that the export stated")
    for path in folder.rglob("*") if digests else ():
        parts = path.relative_to(folder).parts
        is_read = len(parts) > 1 or path.suffix == ".json"
        hidden = any(part.startswith(".") for part in parts)
        if is_read and not hidden and not path.is_dir() and "/".join(parts) not in {*digests, without}:
            raise ValueError(f"{path} is not of the export, and would be read with it: remove it")
