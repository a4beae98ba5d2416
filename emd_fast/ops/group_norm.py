from __future__ import annotations

import torch
from torch import Tensor

from emd_fast import backends
from emd_fast.backends.reference.group_norm import layout
from emd_fast.ops import _check
from emd_fast.ops._define import define, differentiable

_op = define(
    "group_norm",
    "Tensor x, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, Tensor? scale, Tensor? shift, "
    "bool silu",
    "(Tensor, Tensor, Tensor)",
    fake=lambda x, num_groups, *_: (
        torch.empty_like(x, memory_format=layout(x)),
        x.new_empty((x.shape[0], num_groups), dtype=torch.float32),
        x.new_empty((x.shape[0], num_groups), dtype=torch.float32),
    ),
)


def _fake_backward(grad, x, mean, rstd, num_groups, weight, bias, add, scale, shift, silu, needs):
    of_x = torch.empty_like(x, memory_format=layout(x)) if needs[0] else x.new_empty(0)
    others = (weight, bias, add, scale, shift)
    return of_x, *(t.new_empty(t.shape) if need else x.new_empty(0) for t, need in zip(others, needs[1:], strict=True))


_backward_op = define(
    "group_norm_backward",
    "Tensor grad, Tensor x, Tensor mean, Tensor rstd, SymInt num_groups, Tensor? weight, Tensor? bias, Tensor? add, "
    "Tensor? scale, Tensor? shift, bool silu, bool[6] needs",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)


# Position of each tensor among the inputs, in the order of the gradients that the backward op
# returns.
_TENSORS = {"x": 0, "weight": 2, "bias": 3, "add": 5, "scale": 6, "shift": 7}


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.num_groups, weight, bias, _, add, scale, shift, ctx.silu, ctx.backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, mean, rstd, weight, bias, add, scale, shift)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    gradients = [None] * 10
    if grad is None:
        return tuple(gradients)
    needs = [ctx.needs_input_grad[place] for place in _TENSORS.values()]
    x, mean, rstd, *affine = ctx.saved_tensors
    found = _backward_op(grad, x, mean, rstd, ctx.num_groups, *affine, ctx.silu, needs, ctx.backend)
    for place, need, gradient in zip(_TENSORS.values(), needs, found, strict=True):
        gradients[place] = gradient if need else None
    return tuple(gradients)


differentiable("group_norm", _setup_context, _backward)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Group normalization, fused: y = activation(norm(x + add) (1 + scale) + shift).

    `norm` includes weight and bias. Differentiable in all tensors.

    Args:
        x: (B, C, ...) float32, bfloat16 or float16. Contiguous and channels_last tensors are not
            copied.
        num_groups: a divisor of C.
        weight, bias: (C,) in any of the three dtypes, or None.
        eps: added to the variance; positive.
        add: (B, C), added to x before the norm. Stable Diffusion and SongUNet add the embedding
            here.
        scale, shift: (B, C), applied after the norm, as in ADM.
        activation: None or "silu".

    Returns:
        A tensor of the shape, dtype and layout of x. Mean and variance are computed in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.

    Source: Wu and He, "Group Normalization" (arXiv 1803.08494). Scale and shift: Dhariwal and
        Nichol
    (arXiv 2105.05233).
    """
    _check.tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have shape (B, C, ...), got {tuple(x.shape)}")
    batch, channels, *_ = x.shape
    _check.integer("num_groups", num_groups)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must divide the channels: got {num_groups} for {channels} channels")
    for name, value, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("add", add, (batch, channels)),
        ("scale", scale, (batch, channels)),
        ("shift", shift, (batch, channels)),
    ):
        if value is not None:
            _check.tensor(name, value, shape=shape, like=x)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    silu = activation == "silu"
    return _op(x, num_groups, weight, bias, eps, add, scale, shift, silu, backends.active())[0]
