"""Reads numpy arrays as data, without unpickling: from .npz archives, and in pickles (`NAMES`)."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from emd_fast.io.pickles import Built, PickleError

_MAX_DIMS = 8
# numpy itself parses the header as a Python literal.
_HEADER = re.compile(
    rb"\{'descr': '([<|][biufU]\d{1,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,12}L?, ?)*(?:\d{1,12}L?)?)\), \} *\n"
)


def read_npz(path: Path, names: Collection[str], largest: int) -> dict[str, np.ndarray]:
    """Reads arrays of an .npz by name, without pickle. Other arrays in the file are not read.

    Args:
        names: names of the arrays to read.
        largest: the largest size of an array, in bytes.

    Returns:
        The arrays by name. Names that the file does not have are left out.

    Raises:
        ValueError: the file has none of the names, or an array is larger than `largest`, has
            objects as elements, or does not have the size that its header states.
        OSError, zipfile.BadZipFile: the file cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        wanted = {name: members[f"{name}.npy"] for name in names if f"{name}.npy" in members}
        if not wanted:
            there = ", ".join(sorted(members))[:200].replace(".npy", "")
            raise ValueError(f"it has {there or 'nothing'}, and no {' or '.join(names)}")
        return {name: _read_npy(archive, member, name, largest) for name, member in wanted.items()}


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, largest: int) -> np.ndarray:
    # Other methods of compression cannot be read piece by piece.
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is encrypted, or compressed in a way that numpy does not write")
    with archive.open(member) as file:
        start = file.read(10)
        header = _HEADER.fullmatch(file.read(int.from_bytes(start[8:], "little")))
        if start[:8] != b"\x93NUMPY\x01\x00" or header is None:
            raise ValueError(f"{name} is not an array of numbers or text as numpy writes it")
        kind, columns, sizes = (group.decode() for group in header.groups())
        shape = tuple(int(size) for size in re.findall(r"\d+", sizes))
        dtype = np.dtype(kind)
        size = math.prod(shape) * dtype.itemsize
        if len(shape) > _MAX_DIMS or max(size, member.file_size) > largest + 2**16:
            raise ValueError(f"{name} has {max(size, member.file_size):,} bytes, at most {largest:,} are read")
        content = file.read(size + 1)
        if len(content) != size:
            raise ValueError(f"{name} does not have the {size:,} bytes that its header says")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if columns == "True" else "C")


class _Type(Built):
    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def is_one_of(self, codes: tuple[str, ...]) -> bool:
        """Whether the type is one of these, little-endian or of one byte."""
        return self.code in codes and type(self.state) is tuple and self.state[1:2] in (("<",), ("|",))


class PlainArray(Built):
    """An array in a pickle, built from (version, shape, type, is column-major, bytes)."""

    def __init__(self, *_: Any) -> None:
        pass

    def value(self) -> np.ndarray:
        """Returns the array in float32 or float64. It shares the memory of the bytes.

        Raises:
            PickleError: another type, or a shape that does not fit the number of bytes.
        """
        match self.state:
            case (int(), tuple() as shape, _Type() as kind, bool() as columns, bytes() | bytearray() as content):
                sizes = len(shape) <= _MAX_DIMS and all(type(n) is int and 0 <= n < 2**40 for n in shape)
                if not kind.is_one_of(("f4", "f8")):
                    raise PickleError("an array of numpy must be of float32 or float64, little-endian")
                if sizes and math.prod(shape) * int(kind.code[1]) == len(content):
                    return np.frombuffer(content, kind.code).reshape(shape, order="F" if columns else "C")
        raise PickleError("an array of numpy is not described as numpy does it")


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> PlainArray:
    array = PlainArray()
    array.build((1, shape, kind, order == "F", content))
    return array


def _scalar(kind: Any, content: Any) -> bool | int | float:
    if not isinstance(kind, _Type) or type(content) is not bytes:
        raise PickleError("a number of numpy is not described as numpy does it")
    if not kind.is_one_of(("b1", "i4", "i8", "f4", "f8")):
        raise PickleError(f"a number of numpy has the type {kind.code!r}, which is not supported")
    if len(content) != int(kind.code[1]):
        raise PickleError(f"a number of numpy of type {kind.code} has {len(content)} bytes")
    return np.frombuffer(content, kind.code)[0].item()


def _encode(text: Any, codec: Any) -> bytes:
    if codec != "latin1" or type(text) is not str:
        raise PickleError("bytes are not described as Python does it")
    try:
        return text.encode("latin1")
    except UnicodeEncodeError:
        raise PickleError("bytes are not described as Python does it") from None


def never(*_: Any) -> None:
    raise PickleError("a type is called that is only named in these files")


def _core(word: str, make: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {f"numpy.{core}.{word}": make for core in ("core", "_core")}  # the old name, and that since numpy 2


NAMES: dict[str, Callable[..., Any]] = {
    "_codecs encode": _encode,
    "numpy dtype": _Type,
    "numpy ndarray": never,
    **_core("multiarray scalar", _scalar),
    **_core("multiarray _reconstruct", PlainArray),
    **_core("numeric _frombuffer", _from_buffer),
}
