"""Biases of convolutions, which the op behind the convolution adds.

PyTorch adds a bias on a GPU by a second kernel that reads and writes the whole image. Group norm
and the end of a residual block read it anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.cache.conditioning import remember
from emd_fast.cache.weights import autocast_dtype


def leaves_bias(layer: Any) -> bool:
    """Whether `without_bias` leaves the bias of this layer to the op behind it.

    It does for a convolution with a bias that is nothing else: no adapter around it, no hook. A
    convolution with a forward of its own has `without_bias`, and `adds_bias` to decline.
    """
    if any((layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)):
        return False
    if "forward" in vars(layer) or getattr(layer, "bias", None) is None:
        return False
    if hasattr(type(layer), "without_bias"):
        return not layer.adds_bias()
    return type(layer).forward is nn.Conv2d.forward


def without_bias(layer: Any, x: Tensor) -> Tensor:
    """The result of a layer, without the bias where `leaves_bias`."""
    if not leaves_bias(layer):
        result = layer(x)
    elif hasattr(type(layer), "without_bias"):
        result = layer.without_bias(x)
    else:
        result = layer._conv_forward(x, layer.weight, None)
    return result  # type: ignore[no-any-return]


def convolved(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """`without_bias`, and the bias (C,) that it leaves, rounded as autocast does; None if it leaves none."""
    h = without_bias(layer, x)
    if not leaves_bias(layer):
        return h, None
    bias: Tensor = layer.bias
    # Rounded, so that a copy of the network whose weights are bfloat16 computes the same.
    return h, bias.to(autocast_dtype(bias.device.type) or bias.dtype)


def convolved_and_added(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same with the bias as the argument `add` (1, C) of the norm behind."""
    h, bias = convolved(layer, x)
    return h, None if bias is None else bias[None]


def remember_added(projection: nn.Module, layer: Any, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """function(*args), (B, C), plus the bias that `without_bias` leaves; once inside conditioning_cache.

    Args:
        projection: the module whose parameters `function` uses.
        layer: the convolution between whose result and the norm this is added.
    """
    if not leaves_bias(layer):
        made: Tensor = remember(projection, function, *args)
        return made

    def compute(*args: Any) -> Tensor:
        made = function(*args)
        bias = layer.bias.to(autocast_dtype(made.device.type) or layer.bias.dtype)
        return made.to(torch.promote_types(made.dtype, torch.float32)) + bias

    # Under the layer: what was kept without its bias, before a hook or an adapter, is not this.
    made = remember((layer, projection), compute, *args)
    return made
