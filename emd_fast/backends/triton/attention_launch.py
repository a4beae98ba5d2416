"""How the kernels of attention are launched: tiles by head dim, dtype and chip, and how a tensor is read as it lies."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from emd_fast.backends.attention_table import architecture
from emd_fast.backends.triton import launch

_INTERPRETED = 80  # whose tiles Triton's interpreter takes
_VECTOR = 16  # bytes that one thread reads at once


@dataclass(frozen=True)
class Tiles:
    """One choice: queries and keys of a tile, warps of a program, and stages of its pipeline of loads."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    apart: bool = False  # the gradients to k and to v by a launch each, where the two do not fit the registers


# The tiles, by kernel, for head dims up to each of _LIMITS.
_LIMITS = (64, 96, 128, 160, 256)
_TILES = {
    "mma": {  # sm_80, sm_86, sm_89, sm_120: at most 99 KB of shared memory, operands in registers
        "forward": (
            Tiles(128, 64, 4, 3),
            Tiles(128, 64, 8, 3),
            Tiles(128, 64, 8, 3),
            Tiles(128, 32, 8, 3),
            Tiles(64, 32, 8, 2),
        ),
        "to_queries": (
            Tiles(64, 64, 4, 3),
            Tiles(128, 32, 8, 3),
            Tiles(128, 32, 8, 3),
            Tiles(64, 32, 4, 3),
            Tiles(32, 32, 8, 2),
        ),
        "to_keys": (
            Tiles(32, 128, 8, 3),
            Tiles(32, 128, 8, 3),
            Tiles(64, 64, 8, 2),
            Tiles(32, 64, 8, 2, apart=True),
            Tiles(32, 32, 8, 2, apart=True),
        ),
    },
    "sm_90": {
        "forward": (
            Tiles(128, 128, 8, 3),
            Tiles(128, 128, 8, 2),
            Tiles(128, 64, 8, 3),
            Tiles(128, 64, 8, 3),
            Tiles(128, 32, 8, 3),
        ),
        "to_queries": (
            Tiles(128, 64, 8, 3),
            Tiles(128, 64, 8, 3),
            Tiles(128, 64, 8, 3),
            Tiles(128, 64, 8, 3),
            Tiles(128, 32, 8, 3),
        ),
        "to_keys": (
            Tiles(64, 128, 8, 3),
            Tiles(64, 128, 8, 2),
            Tiles(32, 128, 8, 3),
            Tiles(64, 128, 8, 2, apart=True),
            Tiles(32, 128, 8, 2, apart=True),
        ),
    },
}
_TILES["sm_100"] = {
    "forward": _TILES["sm_90"]["forward"],
    "to_queries": (
        Tiles(128, 64, 8, 3),
        Tiles(128, 64, 8, 3),
        Tiles(64, 64, 4, 3),
        Tiles(128, 64, 8, 3),
        Tiles(64, 64, 8, 2),
    ),
    "to_keys": _TILES["sm_90"]["to_keys"],
}
_FLOAT32 = {  # products by fused multiply-adds, which want their operands in registers; on every chip
    "forward": (
        Tiles(32, 32, 4, 2),
        Tiles(32, 32, 4, 2),
        Tiles(32, 16, 4, 2),
        Tiles(32, 16, 4, 2),
        Tiles(16, 16, 4, 2),
    ),
    "to_queries": (
        Tiles(32, 32, 4, 2),
        Tiles(32, 16, 4, 2),
        Tiles(32, 16, 4, 2),
        Tiles(32, 16, 4, 2),
        Tiles(16, 16, 4, 2),
    ),
    "to_keys": (
        Tiles(32, 32, 4, 2),
        Tiles(16, 32, 4, 2),
        Tiles(16, 32, 4, 2),
        Tiles(16, 32, 4, 2),
        Tiles(16, 16, 4, 2),
    ),
}


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
        length: of the side that the programs share out: keys for "to_keys", queries for the others. Half a tile of
            128 and half the warps do for lengths up to 64.
    """
    if role == "delta":
        return Tiles(64, 64, 4, 1)
    table = _FLOAT32 if dtype == torch.float32 else _TILES[chip(architecture)]
    column = next(i for i, limit in enumerate(_LIMITS) if head_dim <= limit)
    choice = table[role][column]
    if length > 64 or 128 != (choice.block_n if role == "to_keys" else choice.block_m):
        return choice
    half = replace(choice, warps=choice.warps // 2)
    return replace(half, block_n=64) if role == "to_keys" else replace(half, block_m=64)


def chip(architecture: int) -> str:
    """The class of a GPU, by its instruction for products of matrices and its shared memory."""
    if architecture < 80:
        raise RuntimeError(f"backend 'triton' cannot run attention on sm_{architecture}: it needs sm_80 or newer")
    if 90 <= architecture < 120:
        return "sm_90" if architecture < 100 else "sm_100"
    return "mma"


def run(role: str, kernel: Any, *args: Tensor | None, q: Tensor, k: Tensor, scale: float = 1.0) -> None:
    """Launches a kernel on tensors (B, tokens or keys, heads, head_dim), read as they lie, and contiguous others.

    A program has one tile of queries (of keys, for "to_keys") of one head.
    """
    (batch, tokens, heads, head_dim), keys = q.shape, k.shape[1]
    choice, (d0, d1), unit = tiles(role, q, k), widths(head_dim), _unit(args)
    rows, block = (keys, choice.block_n) if role == "to_keys" else (tokens, choice.block_m)
    programs = -(-rows // block)
    constants = {
        "HEAD_DIM": head_dim,
        "D0": d0,
        "D1": d1,
        "BLOCK_M": choice.block_m,
        "BLOCK_N": choice.block_n,
        "RAGGED_M": tokens % choice.block_m != 0,
        "RAGGED_N": keys % choice.block_n != 0,
        "NEGATIVE": scale < 0,
        "UNIT": unit,
        "PRECISION": _precision(q.dtype),
    }
    scales = () if role == "delta" else (abs(scale) * math.log2(math.e), scale)
    launch.submit(
        kernel,
        batch * heads * programs,
        (*(_view(x, unit) for x in args), *scales, tokens, keys, heads, programs),
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        choice.warps,
        q.device,
        {"num_stages": choice.stages, "enable_fp_fusion": True},
    )


def tiles(role: str, q: Tensor, k: Tensor) -> Tiles:
    """`pick` for these tensors."""
    capability = architecture(q.device) if q.device.type == "cuda" else _INTERPRETED
    return pick(role, q.shape[3], q.dtype, capability, (k if role == "to_keys" else q).shape[1])


def _view(x: Tensor | None, unit: int) -> Any:
    """What a kernel takes for a tensor: (it, its strides in units) for (B, tokens, heads, head_dim)."""
    return (x, *(stride // unit for stride in _strides(x))) if x is not None and x.dim() == 4 else x


def _strides(x: Tensor) -> tuple[int, ...]:
    # A stride along which there is nothing to step may be any number.
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def _unit(args: tuple[Tensor | None, ...]) -> int:
    """Elements of 16 bytes where every row starts at a multiple of them, otherwise 1."""
    tensors = [x for x in args if x is not None and x.dim() == 4]
    aligned = all(
        value % _VECTOR == 0
        for x in tensors
        for value in (x.data_ptr(), *(stride * x.element_size() for stride in _strides(x)))
    )
    return _VECTOR // tensors[0].element_size() if aligned else 1


def _precision(dtype: torch.dtype) -> str:
    """float32 is multiplied as such, unless the user has allowed TF32 for products of matrices."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
