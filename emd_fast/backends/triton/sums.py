"""Means over a sample, reproducible bit for bit in every run and every batch.

A kernel stores one sum per sample and tile, and `weighted_mean` adds them in a fixed order. There
are no atomics. The tiles depend on the sizes of a sample only.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.tile import of_sample

_STRIP = 1024  # sums that a program adds per iteration


@triton.jit
def store_sum(
    sums,
    value,
    inside,
    batch,
    across,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Stores the sum of `value` over each sample's part of the tile in sums (B, down * across)."""
    program = tl.program_id(0)
    value = tl.where(inside, value, 0.0)
    if PLANES:
        tl.store(sums + program, tl.sum(tl.sum(value, axis=1), axis=0))
    else:
        row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tl.store(sums + row * across + program % across, tl.sum(value, axis=1), mask=row < batch)


@triton.jit(do_not_specialize=["tiles"])
def weighted_mean_kernel(out, sums, weight, factor, elements, tiles, STRIP: tl.constexpr, STRIPS: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, STRIP)
    total = tl.zeros([STRIP], tl.float32)
    for strip in range(STRIPS):
        tile = strip * STRIP + column
        total += tl.load(sums + sample * tiles + tile, mask=tile < tiles, other=0.0)
    mean = tl.div_rn(tl.sum(total, axis=0), elements)
    tl.store(out + sample, of_sample(weight, sample) * factor * mean)


def weighted_mean(
    kernel: Any, *args: Any, like: Tensor, sizes: tuple[int, ...], weight: Tensor, factor: float
) -> Tensor:
    """weight * factor * mean per sample, (B,) float32, of the terms that `kernel` sums."""
    if not like.numel():
        return weight * math.nan  # NaN, the mean of an empty sample; shape (0,) for an empty batch
    batch = like.shape[0]
    loss = torch.empty(batch, dtype=torch.float32, device=like.device)
    choice = launch.pick(batch, sizes, launch.REDUCED_TILE)
    tiles = choice.down * choice.across
    sums = torch.empty(batch * tiles, dtype=torch.float32, device=like.device)
    launch.run(kernel, sums, *args, like=like, sizes=sizes, tile=launch.REDUCED_TILE)
    elements = float(math.prod(sizes))
    strip = min(_STRIP, 1 << (tiles - 1).bit_length())
    launch.submit(
        weighted_mean_kernel,
        batch,
        (loss, sums, launch.by_sample(weight), factor, elements, tiles),
        {"STRIP": strip, "STRIPS": -(-tiles // strip)},
        1,
        like.device,
    )
    return loss
