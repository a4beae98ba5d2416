from __future__ import annotations

from torch import Tensor

from emd_fast import backends
from emd_fast.ops import _check
from emd_fast.ops._define import define, differentiable

_op = define(
    "score_matching_loss",
    "Tensor output, Tensor x0, Tensor x_t, Tensor c_skip, Tensor c_out, Tensor weight",
    "Tensor",
    fake=lambda output, x0, x_t, c_skip, c_out, weight: weight.new_empty(weight.shape),
)
_backward_op = define(
    "score_matching_loss_backward",
    "Tensor grad, Tensor output, Tensor x0, Tensor x_t, Tensor c_skip, Tensor c_out, Tensor weight",
    "Tensor",
    fake=lambda grad, output, *_: output.new_empty(output.shape),
)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.backend = backend


def _backward(ctx, grad):
    grad_output = _backward_op(grad, *ctx.saved_tensors, ctx.backend) if ctx.needs_input_grad[0] else None
    return grad_output, *[None] * 6


differentiable("score_matching_loss", _setup_context, _backward)


def score_matching_loss(
    output: Tensor, x0: Tensor, x_t: Tensor, c_skip: Tensor, c_out: Tensor, weight: Tensor
) -> Tensor:
    """Denoising score matching loss per sample: weight mean((c_skip x_t + c_out output - x0)^2).

    Differentiable in `output`.

    Args:
        output: raw network output, (B, ...) float32, bfloat16 or float16, any strides.
        x0, x_t: the shape of output, each float32, bfloat16 or float16, any strides.
        c_skip, c_out, weight: (B,) float32.

    Returns:
        (B,) float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.

    Source: Vincent, "A connection between score matching and denoising autoencoders" (2011), with
        the
    preconditioning of Karras et al. (arXiv 2206.00364).
    """
    _check.batched("output", output)
    for name, value in (("x0", x0), ("x_t", x_t)):
        _check.tensor(name, value, shape=output.shape, like=output)
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: the loss is differentiable in output alone")
    for name, value in (("c_skip", c_skip), ("c_out", c_out), ("weight", weight)):
        _check.per_sample(name, value, output)
    return _op(output, x0, x_t, c_skip, c_out, weight, backends.active())
