"""Convolution with frozen weights, of which autograd keeps the weight alone.

PyTorch's convolution keeps its input for the gradient of the weight, wanted or not. That is about
half of what a UNet keeps for the backward pass to its input. On a CPU an algorithm of this library
serves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from emd_fast import backends
from emd_fast.backends import native
from emd_fast.cache.weights import autocast_dtype

Pair = tuple[int, int] | list[int]


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
) -> Tensor:
    """conv2d of x (B, C, H, W), differentiable any number of times."""
    trains = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    differentiated = torch.is_grad_enabled() and x.requires_grad
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and torch._C._are_functorch_transforms_active()  # torch.func: ours has no rules for it
    if trains or transformed or x.dim() != 4 or not (differentiated or x.device.type == "cpu"):
        return conv2d(x, weight, bias, stride, padding, dilation, groups)
    if (dtype := autocast_dtype(x.device.type)) is not None and x.dtype != torch.float64:
        # As autocast does it, but before the call: the backward pass is to find the dtypes of the
        # forward pass.
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if not compiling and native.is_loaded():  # the compiler sees through ours
        settings = (stride, padding, dilation, groups, backends.active())
        out: Tensor = torch.ops.emd_fast.frozen_convolution.default(x, weight, bias, *settings)
    elif differentiated:
        out = _ToInput.apply(x, weight, bias, stride, padding, dilation, groups)
    else:
        out = conv2d(x, weight, bias, stride, padding, dilation, groups)
    return out


class _ToInput(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Tensor:
        return conv2d(x, weight, bias, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, *ctx.settings = inputs
        ctx.save_for_backward(weight)
        ctx.size, ctx.strides = x.shape, x.stride()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # Shape and strides of the input are what is asked for; its numbers are not read.
        like = torch.empty_strided(ctx.size, ctx.strides, dtype=grad.dtype, device=grad.device)
        of_x, *_ = torch.ops.aten.convolution_backward(
            grad, like, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return of_x, None, None, None, None, None, None
