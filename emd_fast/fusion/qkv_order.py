"""The projection to q, k and v of EDM's networks, whose rows are put into another order once per E-step.

In the checkpoints q, k and v lie channel by channel, and attention would have to copy them apart. Of a weight with its
rows in the order of `by_part` they come as slices that ops.attention reads where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.cache.qkv_rows import by_part
from emd_fast.cache.weights import autocast_dtype
from emd_fast.fusion.fused_class import STATE
from emd_fast.fusion.layers import Convolution, Rounded


class Packed(Rounded):
    """Its state has the number of heads."""

    prepares = "rows put into the order of q, k, v and rounded once per E-step"

    def prepare(self) -> dict[str, Tensor]:
        made = super().prepare()
        own = {name: self._parameters.get(name) for name in ("weight", "bias")}
        # In place of what was rounded: nothing reads that.
        return {
            _PACKED[name]: by_part(made.pop(name, parameter.detach()), self.__dict__[STATE]["heads"])
            for name, parameter in own.items()
            if type(parameter) in (Tensor, nn.Parameter)
        }

    def packed(self, name: str) -> Tensor | None:
        """The weight (3C, C) or bias (3C,) or None, as products take it: the copy where one was prepared."""
        parameter, prepared = self._parameters[name], self._emd_fast_weight_cache
        if parameter is None:
            return None
        copy = None if prepared is None else prepared.get(_PACKED[name])
        if copy is None or (torch.is_grad_enabled() and parameter.requires_grad):
            return by_part(parameter, self.__dict__[STATE]["heads"])
        dtype = autocast_dtype(copy.device.type) or parameter.dtype
        return copy if copy.dtype == dtype else by_part(parameter, self.__dict__[STATE]["heads"])


_PACKED = {"weight": "packed weight", "bias": "packed bias"}


class PackedConvolution(Packed, Convolution):
    """A Conv2d of PyTorch's."""


def can_pack(layer: Any) -> bool:
    """Whether its weight says all that the layer does: nothing hangs on its calls."""
    return isinstance(layer, Packed) and not (layer._forward_hooks or layer._forward_pre_hooks)


def packed(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that can be packed."""
    return layer.packed("weight"), layer.packed("bias")
