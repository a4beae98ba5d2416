"""The tiles of the attention kernels: a table by chip, kernel and head dim.

No choice was timed. Each is the largest of a few that compiles without spilling registers and within the shared memory
of its chips, which tests/test_attention_compile.py checks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tiles:
    """One choice: queries and keys of a tile, warps of a program, and stages of its pipeline of loads."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    apart: bool = False  # the gradients to k and to v by a launch each, where the two do not fit the registers


_LIMITS = (64, 96, 128, 160, 256)  # the columns: head dims up to these
# "mma": sm_80, sm_86, sm_89, sm_120, which have at least 99 KB of shared memory and keep operands in registers.
# "float32": fused multiply-adds, on every chip; they keep their operands in registers too.
_TABLE = {
    ("mma", "forward"): ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)),
    ("mma", "to_queries"): ((64, 64, 4, 3), (128, 32, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3), (32, 32, 8, 2)),
    ("mma", "to_keys"): ((32, 128, 8, 3), (32, 128, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    ("sm_90", "forward"): ((128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    ("sm_90", "to_queries"): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    ("sm_90", "to_keys"): ((64, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 2)),
    ("sm_100", "forward"): ((128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3)),
    ("sm_100", "to_queries"): ((128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 8, 2), (64, 64, 8, 2)),
    ("sm_100", "to_keys"): ((32, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 2)),
    ("float32", "forward"): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 2), (32, 16, 4, 2), (16, 16, 4, 2)),
    ("float32", "to_queries"): ((16, 16, 4, 2), (32, 16, 4, 2), (16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    ("float32", "to_keys"): ((16, 32, 4, 2), (16, 32, 4, 2), (16, 32, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
}
_APART = 128  # above this head dim two gradients of 16 bits are one too many


def widths(head_dim: int) -> tuple[int, int]:
    """The one or two powers of two, at least 16, that hold a row; the second is 0 where one does.

    Tiles are powers of two and products of matrices want 16 columns. A row is split where two powers take at most three
    quarters of the next one: 40 = 32 + 16 in place of 64, 80 = 64 + 16 in place of 128, 160 = 128 + 32 in place of 256.
    """
    whole = max(1 << (head_dim - 1).bit_length(), 16)
    if whole < 64 or 4 * head_dim > 3 * whole:
        return whole, 0
    rest = head_dim - whole // 2
    return whole // 2, max(1 << (rest - 1).bit_length(), 16)


def pick(role: str, head_dim: int, dtype: torch.dtype, architecture: int, length: int) -> Tiles:
    """The tiles of a kernel: "forward", "to_queries", "to_keys" or "delta"; from its arguments alone.

    Args:
        architecture: the compute capability, 90 for 9.0; 80 at least.
        length: of the side that the programs share out: keys for "to_keys", queries for the others. Half a tile of
            128 and half the warps do for lengths up to 64.
    """
    kind = _chip(architecture)
    if role == "delta":
        return Tiles(16, 16, 4, 1)  # 16 rows of 64 numbers of 16 bits are one vector for each thread
    if dtype == torch.float32:
        kind = "float32"
    column = next(i for i, limit in enumerate(_LIMITS) if head_dim <= limit)
    apart = role == "to_keys" and head_dim > _APART and kind != "float32"
    choice = Tiles(*_TABLE[kind, role][column], apart=apart)
    if length > 64 or 128 != (choice.block_n if role == "to_keys" else choice.block_m):
        return choice
    half = replace(choice, warps=choice.warps // 2)
    return replace(half, block_n=64) if role == "to_keys" else replace(half, block_m=64)


def _chip(architecture: int) -> str:
    """The class of a GPU, by its instruction for products of matrices and its shared memory."""
    if architecture < 80:
        raise RuntimeError(f"backend 'triton' cannot run attention on sm_{architecture}: it needs sm_80 or newer")
    if 90 <= architecture < 120:
        return "sm_90" if architecture < 100 else "sm_100"
    return "mma"
