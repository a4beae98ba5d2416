"""What networks compute of time and condition alone, kept while both are fixed.

Over the steps of an E-step only x changes. Inside `conditioning_cache` a pass of a fused network
(emd_fast.fusion) that is given the very tensors of an earlier pass, unchanged, takes embeddings,
scales, shifts, keys and values from there.

Tensors are told apart by identity and version, never by value: asking for values would make the
host wait, and end a capture. `same` is how code outside of networks hands them the very same
tensors again.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Different conditions of one network inside one block: enough for those of guidance, few enough
# that conditions that are new in every pass do not fill the memory.
_KEPT = 4
_FUNCTIONS = (types.FunctionType, types.MethodType)  # no modules: their parameters may change
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


class _Pass:
    """What one pass of a network computed of its condition, and the tensors that it depends on."""

    def __init__(self, inputs: Any) -> None:
        self.inputs = inputs  # alive, so that no other tensor gets their identity
        self.values: dict[Hashable, tuple[Any, list[int]]] = {}
        # Where each tensor hangs, since another may be put in its place; the tensor; its state.
        self.watched: dict[tuple[int, str], tuple[dict[str, Any], Tensor, tuple[int, int, bool]]] = {}
        self.calls: dict[int, int] = {}

    def holds(self) -> bool:
        """Whether no parameter that went into the values has changed."""
        return all(
            table.get(name) is tensor and _state(tensor) == state
            for (_, name), (table, tensor, state) in self.watched.items()
        )

    def needs_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor, _ in self.watched.values())

    def value(self, modules: tuple[nn.Module, ...], function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        # A module that is called twice in a pass has two values.
        first = id(modules[0])
        call = self.calls[first] = self.calls.get(first, -1) + 1
        given = [leaf for leaf in _tensors((args, kwargs)) if isinstance(leaf, nn.Parameter)]  # a gain, for instance
        key = (first, call, *map(id, given))
        if key in self.values:
            value, versions = self.values[key]
            if versions == [leaf._version for leaf in _tensors(value)]:
                return value
        value = function(*args, **kwargs)
        parts = [part for module in modules for part in module.modules()]
        tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._buffers)]
        for table in (*tables, *({"given": tensor} for tensor in given)):
            for name, tensor in table.items():
                if tensor is not None:
                    self.watched[id(table), name] = (table, tensor, _state(tensor))
        # A value with a history would hand the graph of one pass to the next.
        if not any(leaf.requires_grad or leaf.is_inference() for leaf in _tensors(value)):
            self.values[key] = (value, [leaf._version for leaf in _tensors(value)])
        return value


class _Active(threading.local):
    cache: conditioning_cache | None = None
    current: _Pass | None = None


_active = _Active()


class conditioning_cache:
    """Context manager: fused networks compute once what depends on time and condition alone.

    The results are those without it, bit for bit. A pass takes values from an earlier one only if
    its time and condition are the same tensors, unchanged, in the same modes (autocast, inference)
    and on the same CUDA stream, and no parameter that went into the values has changed. Nothing is
    kept that has, or ought to have, a gradient; nothing is kept of compiled code, of a network in
    training that draws random numbers for its condition, nor after the block.

    Args:
        networks: the modules that it is for; every fused network when there are none.

    Not noticed: changes past autograd's version counters (through .data or NumPy), another weight
    given to an adapter, and an optimizer step inside the block on parameters that FSDP2 has
    sharded.
    """

    def __init__(self, *networks: nn.Module) -> None:
        self._only = {id(module) for network in networks for module in network.modules()} if networks else None
        self._passes: OrderedDict[Hashable, _Pass] = OrderedDict()
        self._same: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()
        self._outer: list[conditioning_cache | None] = []

    def __enter__(self) -> conditioning_cache:
        self._outer.append(_active.cache)
        _active.cache = self
        return self

    def __exit__(self, *exc: object) -> None:
        _active.cache = self._outer.pop()
        self._passes.clear()
        self._same.clear()

    def _pass_of(self, network: nn.Module, inputs: Any) -> _Pass | None:
        if self._only is not None and id(network) not in self._only:
            return None
        key = _key(id(network), inputs)
        if key is None:
            return None
        kept = self._passes.get(key)
        if kept is None or not kept.holds():
            kept = self._passes[key] = _Pass(inputs)
            mine = [other for other in self._passes if other[0] == id(network)]  # type: ignore[index]
            for other in mine[:-_KEPT]:
                del self._passes[other]
        elif kept.needs_gradients():
            return None
        kept.calls = {}
        return kept


@contextlib.contextmanager
def one_pass(network: Any, inputs: Any) -> Iterator[None]:
    """Context manager around one pass of a network; `remember` keeps values for these inputs."""
    cache, outer = _active.cache, _active.current
    # A network inside another belongs to the pass of that one.
    current = outer or (None if cache is None else cache._pass_of(network, inputs))
    _active.current = current
    try:
        yield
    finally:
        _active.current = outer


def remember(module: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs), or what it was in an earlier pass of the same time and condition.

    Args:
        module: the module, or modules (None is skipped), whose parameters the function uses
            besides its arguments.
        function: of nothing but time and condition.
    """
    if torch.compiler.is_compiling() or _active.current is None:
        return function(*args, **kwargs)
    modules = tuple(part for part in module if part is not None) if isinstance(module, tuple) else (module,)
    return _active.current.value(modules, function, args, kwargs)


def same(function: Callable[..., Any], *inputs: Any) -> Any:
    """Returns function(*inputs); inside conditioning_cache the same object for unchanged inputs."""
    if torch.compiler.is_compiling() or _active.cache is None or not isinstance(function, _FUNCTIONS):
        return function(*inputs)
    if (key := _key(function, inputs)) is None:
        return function(*inputs)
    kept = _active.cache._same
    if key in kept:
        value, versions = kept[key][1]
        if versions == [leaf._version for leaf in _tensors(value)]:
            return value
    value = function(*inputs)
    if not any(leaf.requires_grad or leaf.is_inference() for leaf in _tensors(value)):
        kept[key] = (inputs, (value, [leaf._version for leaf in _tensors(value)]))
        while len(kept) > 4 * _KEPT:
            kept.popitem(last=False)
    return value


def _key(what: Hashable, inputs: Any) -> Hashable | None:
    """Equal for the same tensors, unchanged, in the same modes; None where nothing may be kept."""
    leaves, structure = pytree.tree_flatten(inputs)
    told: list[Hashable] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            if not isinstance(leaf, _PLAIN):  # may hold what changes unseen
                return None
            told.append((type(leaf), leaf))
        elif leaf.is_inference() or (leaf.requires_grad and torch.is_grad_enabled()):
            return None
        else:
            told.append((id(leaf), leaf._version))
    autocast = [torch.get_autocast_dtype(device) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    # Of a pass beside this one on another stream nothing may be taken: it is still to be written.
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    return what, structure, tuple(told), torch.is_inference_mode_enabled(), tuple(autocast), stream


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _state(tensor: Tensor) -> tuple[int, int, bool]:
    # An adapter that is switched on or off changes nothing about its parameters but whether they
    # train. The version does not see that .data was replaced. Subclasses (DTensor) have no memory
    # of their own to point to.
    version = -1 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else 0, tensor.requires_grad
