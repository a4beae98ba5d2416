import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.group_norm_parameters import parameter_gradients
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


@triton.jit
def _maps(
    mean,
    rstd,
    weight,
    bias,
    add,
    scale,
    shift,
    sample,
    channel,
    own,
    group,
    there,
    member,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Per channel: centre, gain and offset of y = (x - centre) gain + offset, and rstd.

    y is the value before the activation.
    """
    at = sample * (CHANNELS // WIDTH) + group
    centre = to_rows(tl.load(mean + at, mask=there, other=0.0), member)
    deviation = to_rows(tl.load(rstd + at, mask=there, other=0.0), member)
    if add is not None:
        centre -= numbers(add, sample, channel, own)
    slope, offset = affine(weight, bias, scale, shift, sample, channel, own)
    return centre, deviation * slope, offset, deviation


@triton.jit
def _inner(grad, x, at, inside, centre, gain, offset, SILU: tl.constexpr):
    """Gradient with respect to the activation's input, and x - centre. Both are 0 outside."""
    apart = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre[:, None], 0.0)
    inner = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y = tl.fma(apart, gain[:, None], offset[:, None])
        gate = 1 / (1 + tl.exp(-y))
        inner = inner * gate * tl.fma(y, 1 - gate, 1.0)
    return inner, apart


@triton.jit
def _store_gradient(grad_x, inner, apart, at, inside, gain, along, constant):
    value = tl.fma(inner, gain[:, None], tl.fma(apart, along[:, None], constant[:, None]))
    tl.store(grad_x + at, value.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def _store_sums(
    sums, inner, product, normal, sample, chunk, channel, own, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr
):
    """Stores three sums per channel to sums (B, CHUNKS, 3, CHANNELS).

    They are the sums of the inner gradient, of its product with the normalized x, and of the
    latter.
    """
    at = (sample * CHUNKS + chunk) * (3 * CHANNELS) + channel
    tl.store(sums + at, inner, mask=own)
    tl.store(sums + at + CHANNELS, product, mask=own)
    tl.store(sums + at + 2 * CHANNELS, normal, mask=own)


@triton.jit
def group_norm_backward_kernel(
    grad_x,
    sums,
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    add,
    scale,
    shift,
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
    """Backward pass for groups that fit into registers: reads x and grad once."""
    sample, chunk, channel, own = place(CHANNELS, BLOCK, ROWS, CHUNKS, WIDE)
    start = sample * CHANNELS * positions
    group, there, member = groups_of(own, CHANNELS, WIDTH, BLOCK, ROWS, GROUPS)
    centre, gain, offset, deviation = _maps(
        mean, rstd, weight, bias, add, scale, shift, sample, channel, own, group, there, member, CHANNELS, WIDTH
    )
    at, inside = offsets(channel, own, chunk * COLUMNS, positions, CHANNELS, COLUMNS, LAST)
    inner, apart = _inner(grad + start, x + start, at, inside, centre, gain, offset, SILU)
    of_inner, of_product = tl.sum(inner, axis=1), deviation * tl.sum(inner * apart, axis=1)
    if sums is not None:
        of_normal = deviation * tl.sum(apart, axis=1)
        _store_sums(sums, of_inner, of_product, of_normal, sample, chunk, channel, own, CHANNELS, CHUNKS)
    # gain is rstd times the weight of each channel in the two sums.
    a = tl.div_rn(to_groups(gain * of_inner, member), elements)
    b = tl.div_rn(to_groups(gain * of_product, member), elements)
    constant, along = -to_rows(a, member), -deviation * to_rows(b, member)
    _store_gradient(grad_x + start, inner, apart, at, inside, gain, along, constant)


@triton.jit
def group_norm_backward_sums_kernel(
    parts,
    sums,
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    add,
    scale,
    shift,
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
    """First pass for large groups: sums of a chunk, per group (B, groups, 2, CHUNKS) and channel."""
    sample, chunk, channel, own = place(CHANNELS, BLOCK, ROWS, CHUNKS, WIDE)
    start = sample * CHANNELS * positions
    group, there, member = groups_of(own, CHANNELS, WIDTH, BLOCK, ROWS, GROUPS)
    centre, gain, offset, deviation = _maps(
        mean, rstd, weight, bias, add, scale, shift, sample, channel, own, group, there, member, CHANNELS, WIDTH
    )
    inners = tl.zeros([ROWS, COLUMNS], tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    aparts = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * COLUMNS
        at, inside = offsets(channel, own, first, positions, CHANNELS, COLUMNS, LAST)
        inner, apart = _inner(grad + start, x + start, at, inside, centre, gain, offset, SILU)
        inners += inner
        products = tl.fma(inner, apart, products)
        if sums is not None:
            aparts += apart
    of_inner, of_product = tl.sum(inners, axis=1), deviation * tl.sum(products, axis=1)
    if sums is not None:
        of_normal = deviation * tl.sum(aparts, axis=1)
        _store_sums(sums, of_inner, of_product, of_normal, sample, chunk, channel, own, CHANNELS, CHUNKS)
    if parts is not None:
        place_of = (sample * (CHANNELS // WIDTH) + group) * (2 * CHUNKS) + chunk
        tl.store(parts + place_of, to_groups(gain * of_inner, member), mask=there)
        tl.store(parts + place_of + CHUNKS, to_groups(gain * of_product, member), mask=there)


@triton.jit
def group_norm_backward_apply_kernel(
    grad_x,
    parts,
    grad,
    x,
    mean,
    rstd,
    weight,
    bias,
    add,
    scale,
    shift,
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
    """Second pass: each program adds the sums of the chunks of its groups and computes grad_x."""
    sample, chunk, channel, own = place(CHANNELS, BLOCK, ROWS, CHUNKS, WIDE)
    start = sample * CHANNELS * positions
    group, there, member = groups_of(own, CHANNELS, WIDTH, BLOCK, ROWS, GROUPS)
    centre, gain, offset, deviation = _maps(
        mean, rstd, weight, bias, add, scale, shift, sample, channel, own, group, there, member, CHANNELS, WIDTH
    )
    part = tl.arange(0, PARTS)[None, :]
    mine = there[:, None] & (part < CHUNKS)
    place_of = (sample * (CHANNELS // WIDTH) + group)[:, None] * (2 * CHUNKS) + part
    a = tl.div_rn(tl.sum(tl.load(parts + place_of, mask=mine, other=0.0), axis=1), elements)
    b = tl.div_rn(tl.sum(tl.load(parts + place_of + CHUNKS, mask=mine, other=0.0), axis=1), elements)
    constant, along = -to_rows(a, member), -deviation * to_rows(b, member)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * COLUMNS
        at, inside = offsets(channel, own, first, positions, CHANNELS, COLUMNS, LAST)
        inner, apart = _inner(grad + start, x + start, at, inside, centre, gain, offset, SILU)
        _store_gradient(grad_x + start, inner, apart, at, inside, gain, along, constant)


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
    vectors = (weight, bias, add, scale, shift)
    if not x.numel():
        of = zip(needs, (x, *vectors), strict=True)
        return tuple(t.new_zeros(t.shape) if need and t is not None else x.new_empty(0) for need, t in of)
    call = prepare(x, num_groups, silu, 2)
    plan, batch, channels = call.plan, x.shape[0], x.shape[1]
    grad = grad.contiguous(memory_format=call.format)
    grad_x = torch.empty_like(call.x, memory_format=call.format) if needs[0] else None
    found = [
        torch.empty(t.shape, dtype=t.dtype, device=x.device) if need and t is not None else None
        for need, t in zip(needs[1:], vectors, strict=True)
    ]
    sums = None if all(f is None for f in found) else call.empty(batch, plan.chunks, 3, channels)
    affine_args = tuple(by_channel(t) for t in vectors)
    tensors = (grad, call.x, mean, rstd, *affine_args, call.elements, call.positions)

    def submit(kernel, *args, **more):  # type: ignore[no-untyped-def]
        launch.submit(kernel, call.programs, (*args, *tensors), {**call.constants, **more}, plan.warps, x.device)

    if grad_x is None:
        if sums is not None:
            submit(group_norm_backward_sums_kernel, None, sums)
    elif plan.resident:
        submit(group_norm_backward_kernel, grad_x, sums)
    else:
        parts = call.empty(batch, num_groups, 2, plan.chunks)
        submit(group_norm_backward_sums_kernel, parts, sums)
        submit(group_norm_backward_apply_kernel, grad_x, parts, PARTS=1 << (plan.chunks - 1).bit_length())

    if sums is not None:
        parameter_gradients(call, sums, rstd, affine_args, found)
    return tuple(x.new_empty(0) if f is None else f for f in (grad_x, *found))
