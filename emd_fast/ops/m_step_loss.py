from __future__ import annotations

from torch import Tensor

from emd_fast import backends
from emd_fast.ops import _check
from emd_fast.ops._define import define, differentiable

_op = define(
    "m_step_loss",
    "Tensor generated, Tensor drift, Tensor alpha, Tensor sigma, Tensor weight",
    "Tensor",
    fake=lambda generated, drift, alpha, sigma, weight: weight.new_empty(weight.shape),
)
_backward_op = define(
    "m_step_loss_backward",
    "Tensor grad, Tensor drift, Tensor alpha, Tensor sigma, Tensor weight, ScalarType dtype",
    "Tensor",
    fake=lambda grad, drift, alpha, sigma, weight, dtype: drift.new_empty(drift.shape, dtype=dtype),
)


def _setup_context(ctx, inputs, output) -> None:
    generated, drift, alpha, sigma, weight, backend = inputs
    ctx.save_for_backward(drift, alpha, sigma, weight)
    ctx.dtype, ctx.backend = generated.dtype, backend


def _backward(ctx, grad):
    grad_generated = None
    if ctx.needs_input_grad[0]:
        grad_generated = _backward_op(grad, *ctx.saved_tensors, ctx.dtype, ctx.backend)
    return grad_generated, *[None] * 5


differentiable("m_step_loss", _setup_context, _backward)


def m_step_loss(generated: Tensor, drift: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    """M-step loss per sample: regression of alpha generated on alpha generated + sigma drift.

    The second is the target and is detached. The value is weight / 2 mean(drift^2), and the
    gradient is -weight (alpha / sigma) drift / n for n elements per sample. Neither is computed as
    a difference of two large numbers. Differentiable in `generated`.

    Args:
        generated: g(z_K), (B, ...) float32, bfloat16 or float16, any strides.
        drift: the shape of generated, float32, contiguous.
        alpha, sigma, weight: (B,) float32.

    Returns:
        (B,) float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.
    """
    _check.batched("generated", generated)
    _check.state("drift", drift)
    _check.tensor("drift", drift, shape=generated.shape, like=generated)
    _check.per_sample("alpha", alpha, generated)
    _check.per_sample("sigma", sigma, generated, positive=True)
    _check.per_sample("weight", weight, generated)
    return _op(generated, drift, alpha, sigma, weight, backends.active())
