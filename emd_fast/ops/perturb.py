from __future__ import annotations

import torch
from torch import Tensor

from emd_fast import backends
from emd_fast.noise import Noise
from emd_fast.ops import _check
from emd_fast.ops._define import define, differentiable

_op = define(
    "perturb",
    "Tensor x0, Tensor alpha, Tensor sigma, Tensor? eps, Tensor? noise, SymInt stream, SymInt substep, "
    "ScalarType dtype",
    "Tensor",
    fake=lambda x0, alpha, sigma, eps, noise, stream, substep, dtype: x0.new_empty(x0.shape, dtype=dtype),
)


def _setup_context(ctx, inputs, output) -> None:
    x0, alpha, *_ = inputs
    ctx.save_for_backward(alpha)
    ctx.dtype = x0.dtype


def _backward(ctx, grad):
    (alpha,) = ctx.saved_tensors
    grad_x0 = (alpha.reshape(-1, *[1] * (grad.dim() - 1)) * grad).to(ctx.dtype) if ctx.needs_input_grad[0] else None
    return grad_x0, *[None] * 8


differentiable("perturb", _setup_context, _backward)


def perturb(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    eps: Tensor | None = None,
    noise: Noise | None = None,
    stream: int | None = None,
    substep: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Forward process: x_t = alpha x0 + sigma eps, eps given or drawn in the kernel.

    Differentiable in x0.

    Args:
        x0: (B, ...), float32, bfloat16 or float16, any strides.
        alpha, sigma: (B,) float32.
        eps: the shape of x0; None to draw it from `noise`.
        noise, stream, substep: as for `normal`. Required where eps is None.
        dtype: dtype of the result; that of x0 when None.

    Returns:
        (B, ...) contiguous. The sum is computed in float32 and rounded once.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or both or
            none of eps and noise.
    """
    _check.batched("x0", x0)
    _check.per_sample("alpha", alpha, x0)
    _check.per_sample("sigma", sigma, x0)
    if (eps is None) == (noise is None):
        raise ValueError("perturb takes either eps or noise (with its stream)")
    state = None
    if eps is not None:
        _check.tensor("eps", eps, shape=x0.shape, like=x0)
        if eps.requires_grad:
            raise ValueError("eps must not require a gradient: perturb is differentiable in x0 alone")
    elif stream is None:
        raise ValueError("perturb needs the stream that eps is drawn from")
    elif noise is not None:
        state = _check.noise(noise, stream, substep, len(x0), x0.device)
    dtype = _check.dtype("dtype", x0.dtype if dtype is None else dtype)
    return _op(x0, alpha, sigma, eps, state, stream or 0, substep, dtype, backends.active())
