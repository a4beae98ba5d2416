"""Layers whose weights `weight_cache` prepares once per E-step."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from emd_fast.cache.qkv_rows import by_part
from emd_fast.cache.weights import WEIGHT_CACHE, autocast_dtype, has_memory, is_plain


def cast_parameter(name: str) -> Any:
    """Makes a property that returns a parameter, or its cast copy while weight_cache holds one."""

    def get(layer: Any) -> Any:
        parameters = layer._parameters
        if name not in parameters:  # a reparametrisation has moved it
            if name in layer.__dict__:
                return layer.__dict__[name]
            raise AttributeError(name)
        parameter, prepared = parameters[name], layer._emd_fast_weight_cache
        if prepared is None or name not in prepared or (torch.is_grad_enabled() and parameter.requires_grad):
            return parameter
        copy = prepared[name]
        return copy if autocast_dtype(copy.device.type) == copy.dtype else parameter

    def set(layer: Any, value: Any) -> None:
        layer.__dict__[name] = value

    def delete(layer: Any) -> None:
        del layer.__dict__[name]

    return property(get, set, delete)


class CastWeight:
    """Mixin for a layer whose forward uses its weight in one product and nowhere else.

    A class that has it calls `start_cache` in its constructor.
    """

    rounds: ClassVar[tuple[str, ...]] = ("weight",)
    """The parameters that autocast would cast."""
    weight: Any = cast_parameter("weight")
    _emd_fast_weight_cache: dict[str, Tensor] | None

    def start_cache(self) -> None:
        self.__dict__[WEIGHT_CACHE] = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: None if key == WEIGHT_CACHE else value for key, value in self.__dict__.items()}

    def prepare(self: Any) -> dict[str, Tensor]:
        """The tensors that weight_cache holds, by the names under which the forward looks for them."""
        own = {name: self._parameters.get(name) for name in self.rounds}
        plain = {name: parameter.detach() for name, parameter in own.items() if is_plain(parameter)}
        dtypes = {name: autocast_dtype(parameter.device.type) for name, parameter in plain.items()}
        return {name: parameter.to(dtypes[name]) for name, parameter in plain.items() if dtypes[name] is not None}


class QKVWeight(CastWeight):
    """Mixin for a 1x1 convolution to queries, keys and values with the row order of EDM's checkpoints.

    With the rows in the order of `by_part`, q, k and v are slices that ops.attention reads without
    a copy. weight_cache holds weight and bias in that order. A class that has this mixin also has
    `heads`, the number of heads.
    """

    heads: int

    def prepare(self: Any) -> dict[str, Tensor]:
        made = super().prepare()
        own = {name: self._parameters.get(name) for name in ("weight", "bias")}
        # They replace the rows in the checkpoint's order, which nothing reads.
        return {
            f"packed {name}": by_part(made.pop(name, parameter.detach()), self.heads)
            for name, parameter in own.items()
            if has_memory(parameter)
        }

    def packed(self: Any, name: str) -> Tensor | None:
        """The weight (3C, C) or the bias (3C,) or None, in the order of `by_part`."""
        parameter, prepared = getattr(self, name), self._emd_fast_weight_cache
        if parameter is None:
            return None
        copy = None if prepared is None else prepared.get(f"packed {name}")
        if copy is None or (torch.is_grad_enabled() and parameter.requires_grad):
            return by_part(parameter, self.heads)
        dtype = autocast_dtype(copy.device.type) or parameter.dtype
        return copy if copy.dtype == dtype else by_part(parameter, self.heads)


def can_pack(layer: Any) -> bool:
    """Whether weight and bias say all that the layer does: no adapter around it, no hooks."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return isinstance(layer, QKVWeight) and not hooked
