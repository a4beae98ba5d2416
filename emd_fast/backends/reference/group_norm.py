from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.backends.reference.common import wide


def _flat(x: Tensor) -> Tensor:
    """Reshapes (B, C, *spatial) to (B, C, positions), in the precision of the arithmetic."""
    return wide(x).reshape(*x.shape[:2], -1 if x.numel() else 0)


def _per_channel(values: Tensor) -> Tensor:
    return wide(values)[..., None]


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Combines weight, bias, scale and shift to slope and offset, each (B or 1, C, 1)."""
    slope = x.new_ones(1, x.shape[1], 1) if weight is None else _per_channel(weight)[None]
    offset = x.new_zeros(1, x.shape[1], 1) if bias is None else _per_channel(bias)[None]
    if scale is not None:
        slope, offset = slope * (1 + _per_channel(scale)), offset * (1 + _per_channel(scale))
    if shift is not None:
        offset = offset + _per_channel(shift)
    return slope, offset


def _normalised(x: Tensor, add: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int) -> Tensor:
    u = x if add is None else x + _per_channel(add)
    repeats = x.shape[1] // num_groups
    return (u - mean.repeat_interleave(repeats, 1)[..., None]) * rstd.repeat_interleave(repeats, 1)[..., None]


def _like(values: Tensor, x: Tensor) -> Tensor:
    """Converts values (B, C, positions) to the shape, dtype and layout of x."""
    return torch.empty_like(x, memory_format=layout(x)).copy_(values.reshape(x.shape))


def layout(x: Tensor) -> torch.memory_format:
    """Memory format of the result: channels_last if x is, contiguous otherwise."""
    for dim, channels_last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.dim() == dim and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
            return channels_last
    return torch.contiguous_format


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    flat = _flat(x)
    if not x.numel():
        moments = flat.new_zeros(x.shape[0], num_groups)
        return _like(flat, x), moments, moments.clone()
    u = flat if add is None else flat + _per_channel(add)
    grouped = u.reshape(x.shape[0], num_groups, -1 if x.numel() else 0)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    rstd = torch.rsqrt(variance + eps)
    slope, offset = _affine(flat, weight, bias, scale, shift)
    y = _normalised(flat, add, mean, rstd, num_groups) * slope + offset
    if silu:
        y = torch.nn.functional.silu(y)
    return _like(y, x), mean, rstd


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    flat, grad = _flat(x), _flat(grad)
    slope, offset = _affine(flat, weight, bias, scale, shift)
    normalised = _normalised(flat, add, mean, rstd, num_groups)
    if silu:
        y = normalised * slope + offset
        gate = torch.sigmoid(y)
        grad = grad * gate * (1 + y * (1 - gate))
    grad_slope, grad_offset = (grad * normalised).sum(2), grad.sum(2)

    def grad_x() -> Tensor:
        g = (grad * slope).reshape(x.shape[0], num_groups, -1 if x.numel() else 0)
        n = normalised.reshape(g.shape)
        return ((g - g.mean(2, keepdim=True) - n * (g * n).mean(2, keepdim=True)) * rstd[..., None]).reshape(flat.shape)

    def one_plus_scale(g: Tensor) -> Tensor:
        return g if scale is None else g * (1 + wide(scale))

    def grad_scale() -> Tensor:
        by_weight = grad_slope if weight is None else grad_slope * wide(weight)
        return by_weight if bias is None else by_weight + grad_offset * wide(bias)

    to_input = grad_x() if needs[0] or needs[3] else flat.new_empty(0)
    gradients = (
        (x, lambda: _like(to_input, x)),
        (weight, lambda: one_plus_scale(grad_slope).sum(0)),
        (bias, lambda: one_plus_scale(grad_offset).sum(0)),
        (add, lambda: to_input.sum(2)),
        (scale, grad_scale),
        (shift, lambda: grad_offset),
    )
    return tuple(
        gradient().to(of.dtype) if need and of is not None else x.new_empty(0)
        for need, (of, gradient) in zip(needs, gradients, strict=True)
    )
