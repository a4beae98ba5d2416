import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.reference.group_norm import layout
from emd_fast.backends.triton import launch
from emd_fast.backends.triton.group_norm_backward import group_norm_backward
from emd_fast.backends.triton.groups import (  # fmt: skip
    affine,
    by_channel,
    groups_of,
    numbers,
    offsets,
    place,
    prepare,
    to_groups,
    to_rows,
)

__all__ = ["group_norm", "group_norm_backward"]


@triton.jit
def _with_added(x, add, sample, channel, own):
    if add is not None:
        x = x + numbers(add, sample, channel, own)[:, None]
    return x


@triton.jit
def _finish(remains, squares, elements):
    """Corrects the float32 rounding error of a mean, and the sum of squares with it.

    The mean of x - centre is the error of `centre`. Returns it, and the sum of squared deviations
    from the corrected mean.
    """
    residual = tl.div_rn(remains, elements)
    return residual, tl.maximum(squares - elements * residual * residual, 0.0)


@triton.jit
def _rstd(squares, elements, eps):
    return tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(squares, elements) + eps))


@triton.jit
def _store_result(y, apart, gain, offset, at, inside, SILU: tl.constexpr):
    value = tl.fma(apart, gain[:, None], offset[:, None])
    if SILU:
        value = value / (1 + tl.exp(-value))
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def group_norm_kernel(
    y,
    mean,
    rstd,
    x,
    weight,
    bias,
    add,
    scale,
    shift,
    eps,
    elements,
    positions,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Forward pass for groups that fit into registers: one read and one write of x."""
    sample, chunk, channel, own = place(CHANNELS, BLOCK, ROWS, CHUNKS, WIDE)
    start = sample * CHANNELS * positions
    group, there, member = groups_of(own, CHANNELS, WIDTH, BLOCK, ROWS, GROUPS)
    at, inside = offsets(channel, own, chunk * COLUMNS, positions, CHANNELS, COLUMNS, LAST)
    u = _with_added(tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32), add, sample, channel, own)
    # Two passes over registers: the mean, then the deviations from it.
    centre = tl.div_rn(to_groups(tl.sum(tl.where(inside, u, 0.0), axis=1), member), elements)
    apart = tl.where(inside, u - to_rows(centre, member)[:, None], 0.0)
    remains, total = to_groups(tl.sum(apart, axis=1), member), to_groups(tl.sum(apart * apart, axis=1), member)
    residual, total = _finish(remains, total, elements)
    deviation = _rstd(total, elements, eps)
    tl.store(mean + sample * (CHANNELS // WIDTH) + group, centre + residual, mask=there)
    tl.store(rstd + sample * (CHANNELS // WIDTH) + group, deviation, mask=there)
    slope, offset = affine(weight, bias, scale, shift, sample, channel, own)
    gain = to_rows(deviation, member) * slope
    offset -= gain * to_rows(residual, member)
    _store_result(y + start, apart, gain, offset, at, inside, SILU)


@triton.jit
def group_moments_kernel(
    means,
    squares,
    x,
    add,
    positions,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
):
    """First pass for large groups: mean and squared deviations per chunk, (B, groups, CHUNKS)."""
    sample, chunk, channel, own = place(CHANNELS, BLOCK, ROWS, CHUNKS, WIDE)
    start = sample * CHANNELS * positions
    group, there, member = groups_of(own, CHANNELS, WIDTH, BLOCK, ROWS, GROUPS)
    # Each element of the tile keeps its own moments (Welford 1962), so that the loop has no
    # reduction across threads.
    count = tl.zeros([1, COLUMNS], tl.float32)
    m = tl.zeros([ROWS, COLUMNS], tl.float32)
    s = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * COLUMNS
        at, inside = offsets(channel, own, first, positions, CHANNELS, COLUMNS, LAST)
        u = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32)
        count += tl.where(first + tl.arange(0, COLUMNS)[None, :] < positions, 1.0, 0.0)
        # An element inside the tensor now was inside in every earlier step.
        share = 1.0 / (step + 1.0)
        before = tl.where(inside, u - m, 0.0)
        m = tl.fma(before, share, m)
        s = tl.fma(before, tl.where(inside, u - m, 0.0), s)
    m = _with_added(m, add, sample, channel, own)
    # The moments of all elements are merged (Chan, Golub, LeVeque 1979).
    elements = WIDTH * tl.minimum(positions - chunk * STEPS * COLUMNS, STEPS * COLUMNS).to(tl.float32)
    centre = tl.div_rn(to_groups(tl.sum(count * m, axis=1), member), elements)
    apart = m - to_rows(centre, member)[:, None]
    remains = to_groups(tl.sum(count * apart, axis=1), member)
    total = to_groups(tl.sum(tl.fma(count * apart, apart, s), axis=1), member)
    residual, total = _finish(remains, total, elements)
    place_of = (sample * (CHANNELS // WIDTH) + group) * CHUNKS + chunk
    tl.store(means + place_of, centre + residual, mask=there)
    tl.store(squares + place_of, total, mask=there)


@triton.jit
def group_norm_apply_kernel(
    y,
    mean,
    rstd,
    means,
    squares,
    x,
    weight,
    bias,
    add,
    scale,
    shift,
    eps,
    elements,
    positions,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Second pass: each program merges the moments of the chunks of its groups and normalizes."""
    sample, chunk, channel, own = place(CHANNELS, BLOCK, ROWS, CHUNKS, WIDE)
    start = sample * CHANNELS * positions
    group, there, member = groups_of(own, CHANNELS, WIDTH, BLOCK, ROWS, GROUPS)
    part = tl.arange(0, PARTS)[None, :]
    mine = there[:, None] & (part < CHUNKS)
    place_of = (sample * (CHANNELS // WIDTH) + group)[:, None] * CHUNKS + part
    m = tl.load(means + place_of, mask=mine, other=0.0)
    s = tl.load(squares + place_of, mask=mine, other=0.0)
    left = positions - part.to(chunk.dtype) * (STEPS * COLUMNS)
    count = tl.where(mine, WIDTH * tl.minimum(left, STEPS * COLUMNS).to(tl.float32), 0.0)
    centre = tl.div_rn(tl.sum(count * m, axis=1), elements)
    between = m - centre[:, None]
    total = tl.sum(tl.fma(count * between, between, s), axis=1)
    residual, total = _finish(tl.sum(count * between, axis=1), total, elements)
    deviation = _rstd(total, elements, eps)
    if chunk == 0:
        tl.store(mean + sample * (CHANNELS // WIDTH) + group, centre + residual, mask=there)
        tl.store(rstd + sample * (CHANNELS // WIDTH) + group, deviation, mask=there)

    slope, offset = affine(weight, bias, scale, shift, sample, channel, own)
    gain, middle = to_rows(deviation, member) * slope, to_rows(centre, member)
    offset -= gain * to_rows(residual, member)
    if add is not None:
        middle -= numbers(add, sample, channel, own)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * COLUMNS
        at, inside = offsets(channel, own, first, positions, CHANNELS, COLUMNS, LAST)
        apart = tl.load(x + start + at, mask=inside, other=0.0).to(tl.float32) - middle[:, None]
        _store_result(y + start, apart, gain, offset, at, inside, SILU)


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
    batch = x.shape[0]
    if not x.numel():
        mean = torch.zeros(batch, num_groups, dtype=torch.float32, device=x.device)
        return torch.empty_like(x, memory_format=layout(x)), mean, mean.clone()
    call = prepare(x, num_groups, silu, 1)
    y = torch.empty_like(call.x, memory_format=call.format)
    mean, rstd = call.empty(batch, num_groups), call.empty(batch, num_groups)
    tensors = (call.x, *(by_channel(t) for t in (weight, bias, add, scale, shift)), float(eps), call.elements)
    plan, constants = call.plan, call.constants

    def submit(kernel, *args, **more):  # type: ignore[no-untyped-def]
        launch.submit(kernel, call.programs, (*args, call.positions), {**constants, **more}, plan.warps, x.device)

    if plan.resident:
        submit(group_norm_kernel, y, mean, rstd, *tensors)
    else:
        means, squares = (call.empty(batch, num_groups, plan.chunks) for _ in range(2))
        submit(group_moments_kernel, means, squares, call.x, by_channel(add))
        parts = 1 << (plan.chunks - 1).bit_length()
        submit(group_norm_apply_kernel, y, mean, rstd, means, squares, *tensors, PARTS=parts)
    return y, mean, rstd
