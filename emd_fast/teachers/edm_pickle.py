"""Reads checkpoints of EDM and EDM2 (NVlabs) as data, without executing the Python source in them.

Such a pickle is a dict whose entry "ema" is the network. Every network and layer is a call of
`torch_utils.persistence._reconstruct_persistent_obj` with the name of its class, the source of the
class's module, and its `__dict__`. Every tensor is a call of torch with a storage, which is a
torch file of its own. This module reads the name of the class, its constructor arguments and the
tensors. `io.pickles` reads the file.
"""

from __future__ import annotations

import io
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emd_fast.io import arrays
from emd_fast.io.pickles import Built, Name, PickleError, read

_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
}
# Header of torch files before version 1.6. torch still pickles the storage of a tensor in this format.
_TORCH_MAGIC, _TORCH_FORMAT = 0x1950A86A20F9469CFC6C, 1001
_DEEPEST, _MOST_TENSORS = 32, 20_000  # nesting of modules; tensors of a network
_MOST_VALUES, _MOST_ELEMENTS = 10_000, 2**40  # constructor arguments; elements of a tensor


@dataclass(frozen=True)
class Saved:
    """A network as stored in a file.

    Args:
        class_name: name of the outermost class, such as "EDMPrecond".
        positional, arguments: constructor arguments: None, bool, int, float, str, and lists and
            dicts of them.
        tensors: state-dict name -> tensor on the CPU, in the dtype of the file.
    """

    class_name: str
    positional: list[Any]
    arguments: dict[str, Any]
    tensors: dict[str, Tensor]


def read_network(path: str | Path) -> Saved:
    """Reads the average of the weights (entry "ema") from a checkpoint of EDM or EDM2.

    Nothing in the file is executed.

    Raises:
        PickleError: the file is of another kind, is damaged, or contains more than tensors and
            plain values.
        OSError: the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise PickleError("the file is empty")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as source:
                return _network(source)
    except PickleError as error:
        raise PickleError(f"{path}: {error}") from None


def _network(source: mmap.mmap) -> Saved:
    if source[:1] != b"\x80":
        kind = "a zip archive, as torch.save writes it," if source[:2] == b"PK" else "this file"
        raise PickleError(
            f"{kind} is not a pickle of EDM or EDM2 (protocol 2 or newer): convert a checkpoint of Stable Diffusion "
            "to .safetensors where you trust it, and give that with --teacher-config FOLDER"
        )
    data = read(source, _NAMES)
    if source.tell() != len(source):
        raise PickleError(f"{len(source) - source.tell()} bytes follow the end of the pickle")
    if type(data) is not dict or "ema" not in data:
        found = f"has {', '.join(map(repr, data))}"[:200] if type(data) is dict else "holds something else"
        raise PickleError(f"a checkpoint of EDM has an entry 'ema' with the network; this file {found}")
    root = data["ema"]
    if not isinstance(root, _Persistent):
        raise PickleError("the entry 'ema' is not a network of EDM or EDM2")
    state = root.attributes()
    arguments, positional = _plain(state.get("_init_kwargs")), _plain(state.get("_init_args"))
    if not isinstance(arguments, dict) or not isinstance(positional, list):
        raise PickleError(f"{root.class_name!r} does not say what arguments it was built with")
    tensors: dict[str, Tensor] = {}
    left = len(source)
    for name, record in _tensors(root):
        if len(tensors) == _MOST_TENSORS:
            raise PickleError(f"the network has more than {_MOST_TENSORS:,} tensors: refused")
        # Many views of one storage would take much memory for a small file.
        left -= record.storage.elements().nbytes
        if left < 0:
            raise PickleError("the tensors claim more bytes than the file has")
        tensors[name] = record.decode(name)
    return Saved(root.class_name, positional, arguments, tensors)


# Representations of the objects in the file ------------------------------------------------------------------


class _Module(Built):
    """Representation of an nn.Module: a container of torch, or a class of the file."""

    def attributes(self) -> dict[str, Any]:
        if type(self.state) is not dict:
            raise PickleError("a module has no attributes")
        return self.state


class _Persistent(_Module):
    def __init__(self, meta: Any) -> None:
        if type(meta) is not dict or meta.get("type") != "class" or type(meta.get("class_name")) is not str:
            raise PickleError("a persistent object is not described as torch_utils.persistence does it")
        self.class_name = meta["class_name"][:100]
        self.state = meta.get("state")  # the Python source in meta["module_src"] is ignored


class _Storage:
    def __init__(self, content: Any) -> None:
        if type(content) is not bytes:
            raise PickleError("a storage is not made of bytes")
        self.content = content
        self._read: _Elements | None = None

    def elements(self) -> _Elements:
        self._read = self._read or self._parse()
        return self._read

    def _parse(self) -> _Elements:
        if self.content[:1] != b"\x80":
            raise PickleError("a storage is not in the form in which torch pickles it")
        source = io.BytesIO(self.content)
        magic, version, system = (read(source, {}) for _ in range(3))
        if magic != _TORCH_MAGIC or version != _TORCH_FORMAT or type(system) is not dict:
            raise PickleError("a storage is not in the form in which torch pickles it")
        if system.get("little_endian") is not True:
            raise PickleError("a storage is not little-endian")
        head = read(source, dict.fromkeys(_DTYPES, arrays.never), _announced)
        if not isinstance(head, _Announced) or read(source, {}) != [head.key]:
            raise PickleError("a storage does not hold what it announces")
        found = _Elements(head.dtype, head.count, memoryview(self.content)[source.tell() + 8 :])
        counted = self.content[source.tell() : source.tell() + 8]
        if len(found.content) != found.nbytes or int.from_bytes(counted, "little") != head.count:
            raise PickleError(
                f"a storage of {head.count} elements of {head.dtype} has {len(found.content)} bytes, not {found.nbytes}"
            )
        return found


@dataclass(frozen=True)
class _Elements:
    dtype: torch.dtype
    count: int
    content: memoryview

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


@dataclass(frozen=True)
class _Announced:
    dtype: torch.dtype
    key: str
    count: int


def _announced(identifier: Any) -> _Announced:
    match identifier:
        case ("storage", Name() as kind, str() as key, str(), int() as count, *_) if 0 <= count < _MOST_ELEMENTS:
            return _Announced(_DTYPES[kind.word], key, count)
    raise PickleError("a storage is not described as torch does it")


@dataclass(frozen=True)
class _Record:
    """Representation of a tensor: a view of a storage."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def decode(self, name: str) -> Tensor:
        elements = self.storage.elements()
        count, numel = elements.count, math.prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if numel and (numel > count or last >= count):
            raise PickleError(f"{name!r} is a view of {self.size} elements of a storage of {count}: it is too short")
        storage = torch.empty(count, dtype=elements.dtype)
        if count:
            storage.view(torch.uint8).numpy()[:] = np.frombuffer(elements.content, np.uint8)
        return storage.as_strided(self.size, self.stride, self.offset).clone(memory_format=torch.contiguous_format)


def _record(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> _Record:
    sizes = type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= 8
    if not isinstance(storage, _Storage) or not sizes or any(type(n) is not int for n in (offset, *size, *stride)):
        raise PickleError("a tensor is not described as torch does it")
    # With a stride of 0 a small file would describe a large tensor. torch has no negative strides.
    if min(offset, *size, 0) < 0 or min(*stride, 1, 1) < 1 or max(offset, *size, *stride, 0) >= _MOST_ELEMENTS:
        raise PickleError("a tensor has an offset, size or stride that no saved tensor has: refused")
    return _Record(storage, offset, size, stride)


def _parameter(data: Any, *_: Any) -> _Record:
    if not isinstance(data, _Record):
        raise PickleError("a parameter is not a tensor")
    return data


def _ordered(*items: Any) -> dict[Any, Any]:
    if items:
        raise PickleError("an OrderedDict is not described as Python does it")
    return {}


def _set(items: Any) -> set[Any]:
    if type(items) is not list or any(type(item) is not str for item in items):
        raise PickleError("a set holds more than names")
    return set(items)


_NAMES: dict[str, Callable[..., Any]] = {
    "torch_utils.persistence _reconstruct_persistent_obj": _Persistent,
    "torch.nn.modules.container ModuleDict": _Module,
    "torch.nn.modules.container ModuleList": _Module,
    "torch.nn.modules.container Sequential": _Module,
    "torch._utils _rebuild_tensor_v2": _record,
    "torch._utils _rebuild_parameter": _parameter,
    "torch.storage _load_from_bytes": _Storage,
    "collections OrderedDict": _ordered,
    "dnnlib.util EasyDict": _ordered,
    "builtins set": _set,
    "__builtin__ set": _set,
    **arrays.NAMES,
}


# From objects to a state dict -----------------------------------------------------------------------------------------


def _tensors(root: _Module) -> Iterator[tuple[str, _Record]]:
    """Yields parameters and persistent buffers, by the rules of nn.Module.state_dict."""
    seen: set[int] = set()
    waiting = [("", root, 0)]
    while waiting:
        prefix, module, depth = waiting.pop()
        if id(module) in seen or depth > _DEEPEST:
            raise PickleError("the modules are not a tree: one stands in two places, or they are nested without end")
        seen.add(id(module))
        state = module.attributes()
        transient = state.get("_non_persistent_buffers_set") or ()
        for table in ("_parameters", "_buffers"):
            for name, value in _items(state, table):
                if value is None or (table == "_buffers" and name in transient):
                    continue
                if not isinstance(value, _Record):
                    raise PickleError(f"{prefix + name!r} is not a tensor")
                yield prefix + name, value
        for name, child in _items(state, "_modules"):
            if child is None:
                continue
            if not isinstance(child, _Module):
                raise PickleError(f"{prefix + name!r} is not a module")
            waiting.append((f"{prefix}{name}.", child, depth + 1))


def _items(state: dict[str, Any], table: str) -> list[tuple[str, Any]]:
    found = state.get(table, {})
    if type(found) is not dict or any(type(name) is not str for name in found):
        raise PickleError(f"a module's {table} are not described as torch does it")
    return list(found.items())


def _plain(value: Any) -> Any:
    """Copies a value to lists and dicts that JSON can represent."""
    count = 0

    def copied(value: Any, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > _MOST_VALUES or depth > 8:
            raise PickleError("the constructor's arguments are nested without end")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (list, tuple):
            return [copied(item, depth + 1) for item in value]
        if type(value) is dict and all(type(key) is str for key in value):
            return {key: copied(item, depth + 1) for key, item in value.items()}
        raise PickleError(f"the constructor's arguments hold a {type(value).__name__.strip('_')}")

    return copied(value, 0)
