"""Gradients of weight, bias, add, scale and shift, from per-channel sums of the backward pass."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.groups import Call, affine, groups_of, numbers, place, to_groups, to_rows

# Rows of those sums, and channels, that a program reads per iteration.
_STRIP = 32
_CHANNELS = 32


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
    """Gradients (B, C) of add, scale and shift.

    The sums of the chunks are added in a fixed order.
    """
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
    STRIPS: tl.constexpr,
):
    """Gradients (C,) of weight and bias. Rows are samples and chunks, added in a fixed order."""
    channel = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    own = channel < CHANNELS
    inner = tl.zeros([STRIP, COLUMNS], tl.float32)
    product = tl.zeros([STRIP, COLUMNS], tl.float32)
    for strip in range(STRIPS):
        row = (strip * STRIP + tl.arange(0, STRIP)).to(tl.int64)[:, None]
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


def parameter_gradients(
    call: Call,
    sums: Tensor,
    rstd: Tensor,
    affine_args: tuple[Any, ...],
    gradients: list[Tensor | None],
) -> None:
    """Fills the gradients of weight, bias, add, scale and shift that are not None.

    Args:
        sums: (B, chunks, 3, C) float32, from the backward pass.
        affine_args: the five tensors as kernel arguments, in this order.
        gradients: the five outputs, in this order. None where a gradient is not needed.
    """
    by_weight, by_bias, _, by_scale, _ = affine_args
    grad_weight, grad_bias, *of_samples = gradients
    plan, channels = call.plan, call.x.shape[1]
    if any(g is not None for g in of_samples):
        constants = {k: call.constants[k] for k in ("CHANNELS", "WIDTH", "BLOCK", "ROWS", "GROUPS", "CHUNKS")}
        launch.submit(
            group_norm_vectors_kernel,
            call.programs // plan.chunks,
            (*of_samples, sums, rstd, by_weight, by_bias, by_scale, call.elements, float(call.positions)),
            {**constants, "STRIP": min(_STRIP, 1 << (plan.chunks - 1).bit_length())},
            4,
            sums.device,
        )
    if grad_weight is not None or grad_bias is not None:
        rows = sums.shape[0] * plan.chunks
        strips = -(-rows // _STRIP)
        launch.submit(
            group_norm_parameters_kernel,
            -(-channels // _CHANNELS),
            (grad_weight, grad_bias, sums, by_scale, rows),
            # STRIPS is a power of two, so that few batch sizes compile another kernel.
            {
                "CHANNELS": channels,
                "CHUNKS": plan.chunks,
                "COLUMNS": _CHANNELS,
                "STRIP": _STRIP,
                "STRIPS": 1 << (strips - 1).bit_length(),
            },
            4,
            sums.device,
        )
