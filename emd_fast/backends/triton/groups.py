"""Partition of group_norm over programs: channels, positions and groups of each program.

The rows of a tile are channels and its columns are positions, in either memory layout. A block of
channels consists of whole groups. Its number of channels is seldom a power of two, so some rows of
a tile may be idle.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.reference.group_norm import layout

# Elements that one program keeps in registers (x, and grad in the backward pass): 32 per thread of
# 16 warps. More would spill.
_RESIDENT = 16384
# Elements of such a block where several groups fit: more programs are better than larger ones.
_SMALL = 4096
# Elements of a tile in a loop: 8 per thread of 8 warps, one 128-bit access of bfloat16.
_STREAMED = 2048
# Maximum channels per block. channels_last: 512 bytes of bfloat16. Contiguous: enough to waste few
# rows.
_ROWS_LAST, _ROWS_FIRST = 256, 32
_GROUPS = 16  # maximum groups per block: a sum over groups costs rows times groups
_CHUNKS = 256  # maximum chunks of the positions of a block
_INT32 = 2**31


@dataclass(frozen=True)
class Plan:
    """Parameters of one launch. A tile is `rows` channels by `columns` positions."""

    block: int  # channels of a program: whole groups
    rows: int
    groups: int  # groups of a block, rounded up to a power of two as `rows` is
    columns: int
    steps: int  # tiles that a program processes in a loop
    chunks: int  # programs that share the positions of a block
    warps: int
    wide: bool  # offsets inside a sample need 64 bits; the offset of a sample always has 64

    @property
    def resident(self) -> bool:
        """Whether one tile holds all elements of its groups."""
        return self.chunks * self.steps == 1


@functools.cache
def pick(channels: int, width: int, positions: int, channels_last: bool, tensors: int) -> Plan:
    """Plan for groups of `width` channels.

    It depends on its arguments only, and not on the batch size. So all ranks choose the same plan,
    and the sums over a sample are equal in every batch.

    Args:
        tensors: number of tensors of the size of x that the pass reads.
    """
    # Blocks start at multiples of 8 channels (16 bytes of bfloat16) if samples do.
    unit = math.lcm(width, 8) if channels_last and channels % 8 == 0 else width
    columns = _power_of_two(positions)
    block = _block(channels, unit, width, _SMALL // columns)
    rows = _power_of_two(block)
    if rows * columns * tensors <= _RESIDENT:
        steps = chunks = 1
        warps = min(max(rows * columns // 512, 1), 16)
    else:
        block = _block(channels, unit, width, _ROWS_LAST if channels_last else _ROWS_FIRST)
        rows = _power_of_two(block)
        columns = min(max(_STREAMED // rows, 1), columns)
        tiles = _ceil(positions, columns)
        # Each program of the second pass reads the results of all programs of the first. So the
        # number of programs grows with the square root of the work.
        chunks = min(tiles, _power_of_two(math.isqrt(tiles) + 1), _CHUNKS)
        steps = _ceil(tiles, chunks)
        chunks = _ceil(tiles, steps)
        warps = min(max(rows * columns // 256, 1), 16)
    wide = (channels + rows) * (positions + 2 * steps * columns) >= _INT32
    return Plan(block, rows, _power_of_two(block // width), columns, steps, chunks, warps, wide)


def _block(channels: int, unit: int, width: int, most: int) -> int:
    """Multiple of `unit` that leaves the fewest rows idle.

    Among equals, the one with most rows.
    """
    best, key = unit, (0.0, 0, 0)
    for block in range(unit, _power_of_two(channels) + unit, unit):
        rows = _power_of_two(block)
        if block > unit and (rows > most or block > _GROUPS * width):
            break
        used = channels / (_ceil(channels, block) * rows)
        best, key = (block, (used, rows, -block)) if (used, rows, -block) > key else (best, key)
    return best


@dataclass(frozen=True)
class Call:
    """Input x in its memory format, with the plan and the constants of the launch."""

    x: Tensor
    format: torch.memory_format
    plan: Plan
    constants: dict[str, Any]
    elements: float  # elements of one group

    @property
    def positions(self) -> int:
        return math.prod(self.x.shape[2:])

    @property
    def programs(self) -> int:
        return self.x.shape[0] * _ceil(self.x.shape[1], self.plan.block) * self.plan.chunks

    def empty(self, *size: int) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.x.device)


def prepare(x: Tensor, num_groups: int, silu: bool, tensors: int) -> Call:
    """Prepares a call on x (B, C, ...), not empty.

    Layouts other than contiguous and channels_last are copied, as the CPU backend does.
    """
    format = layout(x)
    x = x.contiguous(memory_format=format)
    channels, positions = x.shape[1], math.prod(x.shape[2:])
    # With one position the two layouts are equal, and channels are adjacent in memory.
    last = format != torch.contiguous_format or positions == 1
    width = channels // num_groups
    plan = pick(channels, width, positions, last, tensors)
    constants = {
        "CHANNELS": channels,
        "WIDTH": width,
        "BLOCK": plan.block,
        "ROWS": plan.rows,
        "GROUPS": plan.groups,
        "COLUMNS": plan.columns,
        "STEPS": plan.steps,
        "CHUNKS": plan.chunks,
        "LAST": last,
        "SILU": silu,
        "WIDE": plan.wide,
    }
    return Call(x, format, plan, constants, float(width * positions))


def by_channel(values: Tensor | None) -> tuple[Any, ...] | None:
    """Kernel argument for a tensor (C,) or (B, C): (tensor, sample stride, channel stride)."""
    if values is None:
        return None
    return (values, 0, *values.stride()) if values.dim() == 1 else (values, *values.stride())


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ceil(n: int, by: int) -> int:
    return -(-n // by)


@triton.jit
def place(CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDE: tl.constexpr):
    """Sample, chunk, channels (ROWS,) and their mask. Adjacent programs read adjacent memory."""
    program = tl.program_id(0)
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    row = tl.arange(0, ROWS)
    channel = program % blocks * BLOCK + row
    own = (row < BLOCK) & (channel < CHANNELS)
    chunk = program // blocks % CHUNKS
    if WIDE:
        channel, chunk = channel.to(tl.int64), chunk.to(tl.int64)
    return (program // blocks // CHUNKS).to(tl.int64), chunk, channel, own


@triton.jit
def groups_of(
    own, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr
):
    """Groups (GROUPS,), their mask, and member (GROUPS, ROWS), the rows that belong to each."""
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    nth = tl.arange(0, GROUPS)
    group = tl.program_id(0) % blocks * (BLOCK // WIDTH) + nth
    there = (nth < BLOCK // WIDTH) & (group < CHANNELS // WIDTH)
    member = (tl.arange(0, ROWS)[None, :] // WIDTH == nth[:, None]) & own[None, :]
    return group, there, member


@triton.jit
def to_groups(by_row, member):
    """Sums rows (ROWS,) over the channels of each group, to (GROUPS,)."""
    return tl.sum(tl.where(member, by_row[None, :], 0.0), axis=1)


@triton.jit
def to_rows(by_group, member):
    """Broadcasts group values (GROUPS,) to the rows of their channels. 0 for idle rows."""
    return tl.sum(tl.where(member, by_group[:, None], 0.0), axis=0)


@triton.jit
def offsets(channel, own, first, positions, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr, LAST: tl.constexpr):
    """Offsets in a sample, and mask, of the tile (ROWS, COLUMNS) from position `first` on."""
    position = first + tl.arange(0, COLUMNS)
    inside = own[:, None] & (position < positions)[None, :]
    if LAST:
        return position[None, :] * CHANNELS + channel[:, None], inside
    return channel[:, None] * positions + position[None, :], inside


@triton.jit
def numbers(values, sample, channel, own):
    """Loads float32 (ROWS,) from an argument that `by_channel` has made."""
    offset = sample * values[1] + channel.to(tl.int64) * values[2]
    return tl.load(values[0] + offset, mask=own, other=0.0).to(tl.float32)


@triton.jit
def affine(weight, bias, scale, shift, sample, channel, own):
    """Combines weight, bias, scale and shift to slope and offset (ROWS,)."""
    slope = tl.where(own, 1.0, 0.0)
    offset = tl.zeros_like(slope)
    if weight is not None:
        slope = numbers(weight, sample, channel, own)
    if bias is not None:
        offset = numbers(bias, sample, channel, own)
    if scale is not None:
        gain = 1 + numbers(scale, sample, channel, own)
        slope, offset = slope * gain, offset * gain
    if shift is not None:
        offset = offset + numbers(shift, sample, channel, own)
    return slope, offset
