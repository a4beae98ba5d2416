import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.groups import (
    affine,
    by_channel,
    groups_of,
    numbers,
    offsets,
    place,
    prepare,
    to_groups,
    to_rows,
)  # fmt: skip

# Rows of the sums over positions that a program of a later kernel reads at a time.
_STRIP = 32
_CHANNELS = 32


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
    """centre, gain and offset of each channel, y = (x - centre) gain + offset before the activation; and its rstd."""
    at = sample * (CHANNELS // WIDTH) + group
    centre = to_rows(tl.load(mean + at, mask=there, other=0.0), member)
    deviation = to_rows(tl.load(rstd + at, mask=there, other=0.0), member)
    if add is not None:
        centre -= numbers(add, sample, channel, own)
    slope, offset = affine(weight, bias, scale, shift, sample, channel, own)
    return centre, deviation * slope, offset, deviation


@triton.jit
def _inner(grad, x, at, inside, centre, gain, offset, SILU: tl.constexpr):
    """The gradient before the activation, and x - centre; 0 outside."""
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
    """Of the inner gradient, of that times the normalised value, of the latter: to sums (B, CHUNKS, 3, CHANNELS)."""
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
    """A block that fits into the registers: x and grad read once, grad_x written once."""
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
    # gain is rstd times what the sums are weighed by.
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
    """What a chunk adds to the two sums of each group, to parts (B, groups, 2, CHUNKS); and its sums of each channel."""
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
    """The sums of all chunks become those of the group, in every program that needs them; then the gradient."""
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


@triton.jit
def group_norm_vectors_kernel(
    grad_add,
    grad_scale,
    grad_shift,
    sums,
    rstd,
    weight,
    bias,
    scale,
    elements,
    positions,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    STRIP: tl.constexpr,
):
    """The gradients (B, C) from the sums over positions: those of all chunks, in their order."""
    sample, _, channel, own = place(CHANNELS, BLOCK, ROWS, 1, False)
    group, there, member = groups_of(own, CHANNELS, WIDTH, BLOCK, ROWS, GROUPS)
    inner = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    normal = tl.zeros([ROWS], tl.float32)
    for start in range(0, CHUNKS, STRIP):
        chunk = start + tl.arange(0, STRIP)[None, :]
        mask = own[:, None] & (chunk < CHUNKS)
        at = (sample * CHUNKS + chunk) * (3 * CHANNELS) + channel[:, None]
        inner += tl.sum(tl.load(sums + at, mask=mask, other=0.0), axis=1)
        product += tl.sum(tl.load(sums + at + CHANNELS, mask=mask, other=0.0), axis=1)
        normal += tl.sum(tl.load(sums + at + 2 * CHANNELS, mask=mask, other=0.0), axis=1)
    out = sample * CHANNELS + channel
    if grad_shift is not None:
        tl.store(grad_shift + out, inner.to(grad_shift.dtype.element_ty), mask=own)
    if grad_scale is not None:
        value = product
        if weight is not None:
            value = value * numbers(weight, sample, channel, own)
        if bias is not None:
            value = tl.fma(inner, numbers(bias, sample, channel, own), value)
        tl.store(grad_scale + out, value.to(grad_scale.dtype.element_ty), mask=own)
    if grad_add is not None:
        slope, _ = affine(weight, None, scale, None, sample, channel, own)
        a = to_rows(tl.div_rn(to_groups(slope * inner, member), elements), member)
        b = to_rows(tl.div_rn(to_groups(slope * product, member), elements), member)
        deviation = tl.load(rstd + sample * (CHANNELS // WIDTH) + group, mask=there, other=0.0)
        value = tl.fma(slope, inner, -(a * positions)) - b * normal
        value = value * to_rows(deviation, member)
        tl.store(grad_add + out, value.to(grad_add.dtype.element_ty), mask=own)


@triton.jit(do_not_specialize=["rows"])
def group_norm_parameters_kernel(
    grad_weight,
    grad_bias,
    sums,
    scale,
    rows,
    CHANNELS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRIP: tl.constexpr,
):
    """The gradients (C,): rows are samples and their chunks, added in their order."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = channel < CHANNELS
    inner = tl.zeros([STRIP, COLUMNS], tl.float32)
    product = tl.zeros([STRIP, COLUMNS], tl.float32)
    for start in range(0, rows, STRIP):
        row = (start + tl.arange(0, STRIP)).to(tl.int64)[:, None]
        mask = own[None, :] & (row < rows)
        at = row * (3 * CHANNELS) + channel[None, :]
        i = tl.load(sums + at, mask=mask, other=0.0)
        p = tl.load(sums + at + CHANNELS, mask=mask, other=0.0)
        if scale is not None:
            gain = 1 + numbers(scale, row // CHUNKS, channel[None, :], mask)
            i, p = i * gain, p * gain
        inner += i
        product += p
    if grad_weight is not None:
        tl.store(grad_weight + channel, tl.sum(product, axis=0).to(grad_weight.dtype.element_ty), mask=own)
    if grad_bias is not None:
        tl.store(grad_bias + channel, tl.sum(inner, axis=0).to(grad_bias.dtype.element_ty), mask=own)


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
        wanted = [need and t is not None for need, t in zip(needs, (x, *vectors), strict=True)]
        return tuple(torch.zeros_like(t) if w else x.new_empty(0) for w, t in zip(wanted, (x, *vectors), strict=True))
    call = prepare(x, num_groups, silu, 2)
    plan, batch, channels = call.plan, x.shape[0], x.shape[1]
    grad = grad.contiguous(memory_format=call.format)
    grad_x = torch.empty_like(call.x, memory_format=call.format) if needs[0] else None
    grad_weight, grad_bias, grad_add, grad_scale, grad_shift = found = [
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

    by_weight, by_bias, _, by_scale, _ = affine_args
    if any(f is not None for f in (grad_add, grad_scale, grad_shift)):
        constants = {k: call.constants[k] for k in ("CHANNELS", "WIDTH", "BLOCK", "ROWS", "GROUPS", "CHUNKS")}
        launch.submit(
            group_norm_vectors_kernel,
            call.programs // plan.chunks,
            (grad_add, grad_scale, grad_shift, sums, rstd, by_weight, by_bias, by_scale)
            + (call.elements, float(call.positions)),
            {**constants, "STRIP": min(_STRIP, 1 << (plan.chunks - 1).bit_length())},
            4,
            x.device,
        )
    if any(f is not None for f in (grad_weight, grad_bias)):
        launch.submit(
            group_norm_parameters_kernel,
            -(-channels // _CHANNELS),
            (grad_weight, grad_bias, sums, by_scale, batch * plan.chunks),
            {"CHANNELS": channels, "CHUNKS": plan.chunks, "COLUMNS": _CHANNELS, "STRIP": _STRIP},
            4,
            x.device,
        )
    return tuple(x.new_empty(0) if f is None else f for f in (grad_x, *found))
