"""Tile sizes of the attention kernels, a table by architecture, kernel and head_dim.

No entry was timed. Each is the largest of a few candidates that compiles without register spills
and within the shared memory of its architectures. tests/test_attention_compile.py checks both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Tiles:
    """Launch parameters: queries and keys per tile, warps, and stages of the load pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    # One launch for k and one for v, where both gradients do not fit the registers.
    apart: bool = False


_LIMITS = (64, 96, 128, 160, 256)  # the columns of the table: largest head_dim of each
# "mma": sm_80, sm_86, sm_89 and sm_120. They have at least 99 KB of shared memory and keep operands
# in registers. "float32": no tensor cores, any architecture. Operands are in registers too.
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
_APART = 128  # above this head_dim, 16-bit gradients of k and v do not fit one launch


def widths(head_dim: int) -> tuple[int, int]:
    """Splits head_dim into one or two tile widths. The second is 0 if one is enough.

    Widths are powers of two, and tl.dot requires at least 16 columns. A row is split where two
    widths take at most three quarters of one: 40 = 32 + 16 instead of 64, 80 = 64 + 16 instead of
    128, 160 = 128 + 32 instead of 256.
    """
    whole = max(1 << (head_dim - 1).bit_length(), 16)
    if whole < 64 or 4 * head_dim > 3 * whole:
        return whole, 0
    rest = head_dim - whole // 2
    return whole // 2, max(1 << (rest - 1).bit_length(), 16)


def pick(role: str, head_dim: int, dtype: torch.dtype, architecture: int, length: int) -> Tiles:
    """Tile sizes of a kernel. They depend on the arguments only.

    Args:
        role: "forward", "to_queries", "to_keys" or "delta".
        architecture: compute capability, 90 for 9.0; at least 80.
        length: number of keys for "to_keys", of queries for the other roles. Up to a length of 64,
            a tile of 128 is halved, with half the warps.

    Raises:
        RuntimeError: an architecture below 80.
    """
    kind = _chip(architecture)
    if role == "delta":
        return Tiles(16, 16, 4, 1)  # 16 rows of 64 16-bit elements: one vector load per thread
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
    """Table key of a GPU, by its matmul instruction and shared memory."""
    if architecture < 80:
        raise RuntimeError(f"backend 'triton' cannot run attention on sm_{architecture}: it needs sm_80 or newer")
    if 90 <= architecture < 120:
        return "sm_90" if architecture < 100 else "sm_100"
    return "mma"
