"""The format of a checkpoint folder: `manifest.json` and one file of raw bytes for each rank that wrote it.

The manifest is JSON. It holds the facts of the checkpoint, size and SHA-256 of every file, and the
table of contents: dtype and shape of every tensor, and where its rows are. No pickle is written or
read. A manifest may come from anybody, so every field is checked, against the sizes of the files
too, before one byte of a tensor is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from emd_fast.distributed.rows import Rows
from emd_fast.io.signed import json_of

MANIFEST = "manifest.json"
VERSION = 3  # 1 and 2 kept their table of contents as a pickle
_FORMAT = "emd_fast checkpoint"
_MAX_MANIFEST = 2**28  # bytes
_MAX_DIMS, _MAX_BYTES = 25, 2**60  # of a tensor
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint16, torch.uint32, torch.uint64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
    )
}


class FormatError(ValueError):
    """A manifest that is missing, damaged, foreign or contradictory: the reason, without the path."""


class OtherVersion(FormatError):
    """A checkpoint that another release of emd_fast wrote."""


class File(NamedTuple):
    """The file of one rank: its size in bytes, and the SHA-256 of its contents."""

    size: int
    sha256: str


class Chunk(NamedTuple):
    """Consecutive rows of a tensor, contiguous in the file of `rank` from byte `begin`."""

    rank: int
    begin: int
    rows: int


@dataclass(frozen=True)
class Entry:
    """Where one tensor is.

    Args:
        chunks: in the order of their rows, without gaps. A tensor of no elements has none; a scalar
            has one row.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder holds.

    Args:
        facts: plain values that JSON can hold.
        files: by rank.
        tensors: by "part.name"; no part has the name of a fact.
    """

    facts: dict[str, Any]
    files: tuple[File, ...]
    tensors: dict[str, Entry]

    def encode(self) -> bytes:
        """The manifest as JSON, with the SHA-256 of itself as its last field."""
        tensors = {
            name: {"dtype": str(entry.dtype).removeprefix("torch."), "shape": entry.shape, "chunks": entry.chunks}
            for name, entry in self.tensors.items()
        }
        table = {"format": _FORMAT, "version": VERSION, "facts": self.facts, "files": self.files, "tensors": tensors}
        return signed(table)


@dataclass(frozen=True)
class Written:
    """What one rank has written.

    Args:
        chunks: (name, first row, first byte, number of rows) of each tensor that it has rows of.
    """

    file: File
    chunks: tuple[tuple[str, int, int, int], ...]


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.bin"


# The manifest ---------------------------------------------------------------------------------------------------------


def signed(table: Mapping[str, Any]) -> bytes:
    """The table as JSON, with the SHA-256 of its JSON as the last field."""
    return json_of(table).encode()


def read(folder: Path) -> Manifest:
    """Reads and checks the manifest of a folder. The other files are not opened.

    Raises:
        OtherVersion: another release wrote it. FormatError: it is not a manifest, or contradicts itself.
    """
    path = folder / MANIFEST
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_MANIFEST:
            raise FormatError(f"{MANIFEST} is not a file of at most {_MAX_MANIFEST >> 20} MiB")
        content = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{MANIFEST}: {error.strerror or type(error).__name__}") from None
    return decode(content)


def decode(content: bytes) -> Manifest:
    """Checks the contents of a manifest, every field.

    Raises:
        OtherVersion: another release wrote it. FormatError: it is not a manifest, or contradicts itself.
    """
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{MANIFEST} is not JSON ({type(error).__name__})") from None
    if not isinstance(table, dict) or table.get("format") != _FORMAT:
        raise FormatError(f"{MANIFEST} is not that of a checkpoint")
    version = table.get("version")
    if type(version) is int and version != VERSION:
        age = "an earlier" if version < VERSION else "a later"
        raise OtherVersion(
            f"has format version {version}, of {age} release; this release reads version {VERSION} alone"
        )
    digest = table.pop("sha256", None)
    # Compared as bytes: a bit that turns is seen even where JSON would give the same values.
    if type(digest) is not str or signed(table) != content:
        raise FormatError(f"{MANIFEST} does not have the SHA-256 that it states")
    _need(table.keys() == {"format", "version", "facts", "files", "tensors"} and type(version) is int, "fields")
    return _checked(table)


def _checked(table: dict[str, Any]) -> Manifest:
    facts, files, tensors = table["facts"], table["files"], table["tensors"]
    _need(type(facts) is dict, "facts")
    _need(type(files) is list and type(tensors) is dict, "files or tensors")
    kept = tuple(map(_file, files))
    entries = {name: _entry(name, fields, kept) for name, fields in tensors.items()}
    for name in entries:
        part, _, key = name.partition(".")
        _need(bool(part and key) and part not in facts, f"the name {name[:100]!r}")
    _check_tiling(kept, entries.values())
    return Manifest(facts, kept, entries)


def _file(fields: Any) -> File:
    match fields:
        case [int() as size, str() as digest] if _is_count(size, 2**62) and _SHA256.fullmatch(digest):
            return File(size, digest)
    raise FormatError(f"{MANIFEST} has a file that is not described by its size and SHA-256")


def _entry(name: str, fields: Any, files: tuple[File, ...]) -> Entry:
    said = repr(name[:100])
    _need(type(fields) is dict and fields.keys() == {"dtype", "shape", "chunks"}, f"the entry {said}")
    dtype, shape, chunks = fields["dtype"], fields["shape"], fields["chunks"]
    _need(type(dtype) is str and dtype in _DTYPES, f"the dtype of {said}")
    _need(type(shape) is list and len(shape) <= _MAX_DIMS, f"the shape of {said}")
    _need(all(_is_count(n, _MAX_BYTES) for n in shape), f"the shape of {said}")
    # Strides are products of sizes, so the sizes of an empty tensor are bounded too.
    size = math.prod(max(n, 1) for n in shape) * _DTYPES[dtype].itemsize
    _need(size < _MAX_BYTES, f"the shape of {said}")
    _need(type(chunks) is list, f"the chunks of {said}")
    entry = Entry(_DTYPES[dtype], tuple(shape), tuple(_chunk(said, chunk, files) for chunk in chunks))
    rows = 0 if 0 in shape else shape[0] if shape else 1
    _need(sum(chunk.rows for chunk in entry.chunks) == rows, f"the rows of {said}")
    return entry


def _chunk(said: str, fields: Any, files: tuple[File, ...]) -> Chunk:
    match fields:
        case [int() as rank, int() as begin, int() as rows] if (
            _is_count(rank, len(files)) and _is_count(begin, _MAX_BYTES) and _is_count(rows, _MAX_BYTES) and rows
        ):
            return Chunk(rank, begin, rows)
    raise FormatError(f"{MANIFEST} has wrong chunks of {said}")


def _check_tiling(files: tuple[File, ...], entries: Iterable[Entry]) -> None:
    """Every byte of every file belongs to exactly one tensor: tensors take no more memory than the files."""
    chunks = sorted(
        (chunk.rank, chunk.begin, chunk.rows * entry.row_bytes) for entry in entries for chunk in entry.chunks
    )
    ends = [0] * len(files)
    for rank, begin, size in chunks:
        _need(begin == ends[rank], f"chunks that overlap or leave gaps in {file_name(rank)}")
        ends[rank] = begin + size
    for rank, (file, end) in enumerate(zip(files, ends, strict=True)):
        _need(file.size == end, f"chunks that are not of the size of {file_name(rank)}")


def _is_count(value: Any, below: int) -> bool:
    return type(value) is int and 0 <= value < below


def _need(holds: bool, what: str) -> None:
    if not holds:
        raise FormatError(f"{MANIFEST} is wrong in {what}")


# The files of the ranks -----------------------------------------------------------------------------------------------


def write_rows(folder: Path, rank: int, mine: Mapping[str, Rows]) -> Written:
    """Writes the file of a rank, and waits until it is on the disk.

    Raises:
        OSError: what the file system says.
    """
    digest, chunks = hashlib.sha256(), []
    with open(folder / file_name(rank), "wb") as file:
        for name, own in mine.items():
            if own.values.numel():
                content = _bytes(own.values.contiguous().cpu())
                chunks.append((name, own.first, file.tell(), len(own.values)))
                file.write(content)
                digest.update(content)
        file.flush()
        os.fsync(file.fileno())
        return Written(File(file.tell(), digest.hexdigest()), tuple(chunks))


def wrong_file(folder: Path, manifest: Manifest, first: int, every: int) -> str | None:
    """The name of the first file that is not what the manifest says, or None.

    The size of each file is compared, and the contents of every `every`-th from `first` on; of none
    where `every` is 0.
    """
    for rank, (size, digest) in enumerate(manifest.files):
        path = folder / file_name(rank)
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                return path.name
            if every and rank % every == first:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        return path.name
        except OSError:
            return path.name
    return None


def read_rows(folder: Path, manifest: Manifest, into: Mapping[str, Rows]) -> None:
    """Reads rows of tensors, which have the shape and dtype of the manifest, in place, file by file.

    Raises:
        OSError: a file that cannot be read, or is too short.
    """
    wanted: dict[int, list[tuple[int, Tensor]]] = {}
    for name, own in into.items():
        entry, first, last, start = manifest.tensors[name], own.first, own.first + len(own.values), 0
        for rank, begin, count in entry.chunks:
            low, high = max(start, first), min(start + count, last)
            if low < high:
                part = own.values[low - first : high - first]
                wanted.setdefault(rank, []).append((begin + (low - start) * entry.row_bytes, part))
            start += count
    for rank, parts in wanted.items():
        with open(folder / file_name(rank), "rb") as file:
            for begin, part in parts:
                content = torch.empty(part.shape, dtype=part.dtype)
                file.seek(begin)
                if file.readinto(_bytes(content)) != content.nbytes:
                    raise OSError(f"{file_name(rank)} is too short")
                part.copy_(content)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
