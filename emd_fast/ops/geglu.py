from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from emd_fast import backends
from emd_fast.backends.reference.common import wide
from emd_fast.backends.reference.geglu import gelu_derivatives
from emd_fast.ops import _check
from emd_fast.ops._define import define, differentiable

_op = define(
    "geglu",
    "Tensor packed",
    "Tensor",
    fake=lambda packed: packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2)),
)
_backward_op = define(
    "geglu_backward",
    "Tensor grad, Tensor packed",
    "Tensor",
    fake=lambda grad, packed: packed.new_empty(packed.shape),
)


def _setup_context(ctx, inputs, output) -> None:
    packed, ctx.backend = inputs
    ctx.save_for_backward(packed)


def _backward(ctx, grad):
    (packed,) = ctx.saved_tensors
    return _backward_op(grad, packed, ctx.backend), None


differentiable("geglu", _setup_context, _backward)


def _setup_second(ctx, inputs, output) -> None:
    grad, packed, _ = inputs
    ctx.save_for_backward(grad, packed)


def _second(ctx, outer):
    """Second derivatives, which no training step of this library needs, in plain PyTorch."""
    grad, packed = ctx.saved_tensors
    values, gates = wide(packed).chunk(2, dim=-1)
    of_values, of_gates = wide(outer).chunk(2, dim=-1)
    g = wide(grad)
    slope, curve = gelu_derivatives(gates)
    to_grad = to_packed = None
    if ctx.needs_input_grad[0]:
        to_grad = (of_values * gelu(gates) + of_gates * values * slope).to(grad.dtype)
    if ctx.needs_input_grad[1]:
        to_gates = of_values * g * slope + of_gates * g * values * curve
        to_packed = torch.cat([of_gates * g * slope, to_gates], dim=-1).to(packed.dtype)
    return to_grad, to_packed, None


differentiable("geglu_backward", _setup_second, _second)


def geglu(packed: Tensor) -> Tensor:
    """GEGLU of values and gates in one tensor: values * gelu(gates), in one pass.

    Differentiable any number of times. The backward pass is one pass too and keeps `packed` alone.

    Args:
        packed: (..., 2 H), values first, float32, bfloat16 or float16. A tensor that is not
            contiguous is copied.

    Returns:
        (..., H) contiguous, dtype of packed. Computed in float32 with the exact GELU (erf) and
        rounded once.

    Raises:
        TypeError, ValueError: not a tensor, another dtype, or a last dimension that is not even.

    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
    """
    _check.batched("packed", packed)
    if packed.shape[-1] % 2:
        raise ValueError(f"packed must have an even last dimension, got shape {tuple(packed.shape)}")
    return _op(packed, backends.active())
