"""How the kernels of attention are launched, and how a tensor is read as it lies."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from emd_fast.backends.attention_table import architecture
from emd_fast.backends.triton import launch
from emd_fast.backends.triton.attention_tiles import Tiles, pick, widths

_INTERPRETED = 80  # whose tiles Triton's interpreter takes
_VECTOR = 16  # bytes that one thread reads at once


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
