from __future__ import annotations

import math

import torch
from torch import Tensor

from emd_fast import backends
from emd_fast.backends.reference.group_norm import layout
from emd_fast.ops import _check
from emd_fast.ops._define import define, differentiable

_op = define(
    "residual",
    "Tensor x, Tensor skip, Tensor? bias, Tensor? skip_bias, float scale",
    "Tensor",
    fake=lambda x, skip, *_: torch.empty_like(
        x, dtype=torch.promote_types(x.dtype, skip.dtype), memory_format=layout(x)
    ),
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, _ = inputs
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]


def _backward(ctx, grad):
    needs = ctx.needs_input_grad
    of_x, of_skip, of_bias, of_skip_bias = ctx.dtypes
    by_channel = None
    if needs[2] or needs[3]:
        by_channel = grad.sum([d for d in range(grad.dim()) if d != 1], dtype=torch.float32) * ctx.scale
    if ctx.scale != 1 and (needs[0] or needs[1]):
        grad = grad * ctx.scale
    return (
        grad.to(of_x) if needs[0] else None,
        grad.to(of_skip) if needs[1] else None,
        by_channel.to(of_bias) if needs[2] else None,
        by_channel.to(of_skip_bias) if needs[3] else None,
        None,
        None,
    )


differentiable("residual", _setup_context, _backward)


def residual(
    x: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    skip_bias: Tensor | None = None,
    *,
    scale: float = 1.0,
) -> Tensor:
    """End of a residual block in one pass: (x + skip + bias + skip_bias) scale.

    The biases are those of the convolutions that gave x and skip. PyTorch adds each of them on a
    GPU in a pass over the image. Differentiable in all tensors.

    Args:
        x: (B, C, ...) float32, bfloat16 or float16. Contiguous and channels_last tensors are not
            copied.
        skip: the shape of x, in any of the three dtypes; not copied in the layout of x.
        bias, skip_bias: (C,) in any of the three dtypes, or None.
        scale: of the sum; finite.

    Returns:
        A tensor of the shape and layout of x, in the dtype to which PyTorch promotes those of x
        and skip. The sum is computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    _check.tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape (B, C, ...), got {tuple(x.shape)}")
    _check.tensor("skip", skip, shape=x.shape, like=x)
    for name, value in (("bias", bias), ("skip_bias", skip_bias)):
        if value is not None:
            _check.tensor(name, value, shape=x.shape[1:2], like=x)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    return _op(x, skip, bias, skip_bias, float(scale), backends.active())
