"""What numpy writes into pickles, as names for `plain_pickle`: numbers and arrays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from emd_fast.io.plain_pickle import Built, PickleError


class _Type(Built):
    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code

    def is_one_of(self, codes: tuple[str, ...]) -> bool:
        """Whether it is one of these types, in the byte order of this machine's files."""
        return self.code in codes and type(self.state) is tuple and self.state[1:2] in (("<",), ("|",))


class PlainArray(Built):
    """An array: made empty, then given (version, shape, type, column-major, bytes)."""

    def __init__(self, *_: Any) -> None:
        pass

    def value(self) -> np.ndarray:
        """The array, of float32 or float64.

        Raises:
            PickleError: another type, or a shape that is not that of the bytes.
        """
        match self.state:
            case (int(), tuple() as shape, _Type() as kind, bool() as columns, bytes() | bytearray() as content):
                sizes = all(type(n) is int and n >= 0 for n in shape)
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
