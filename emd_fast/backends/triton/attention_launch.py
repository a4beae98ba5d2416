"""Launch of the attention kernels on tensors of any strides."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from emd_fast.backends.attention_table import architecture
from emd_fast.backends.triton import launch
from emd_fast.backends.triton.attention_tiles import Tiles, pick, widths

_INTERPRETED = 80  # the architecture whose tiles Triton's interpreter uses
_VECTOR = 16  # bytes of one vector load


def run(role: str, kernel: Any, *args: Tensor | None, q: Tensor, k: Tensor, scale: float = 1.0) -> None:
    """Launches a kernel of attention.

    Each program has one tile of queries of one head, or of keys for the role "to_keys".

    Args:
        args: tensors (B, tokens or keys, heads, head_dim) of any strides, and contiguous others.
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
    """Tile sizes for these tensors, by `pick`."""
    capability = architecture(q.device) if q.device.type == "cuda" else _INTERPRETED
    return pick(role, q.shape[3], q.dtype, capability, (k if role == "to_keys" else q).shape[1])


def _view(x: Tensor | None, unit: int) -> Any:
    """Kernel argument for a 4-d tensor: (tensor, three strides in units).

    Others are passed as is.
    """
    return (x, *(stride // unit for stride in _strides(x))) if x is not None and x.dim() == 4 else x


def _strides(x: Tensor) -> tuple[int, ...]:
    # PyTorch permits any stride for a dimension of size 1.
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def _unit(args: tuple[Tensor | None, ...]) -> int:
    """Number of elements in 16 bytes if all rows of all tensors are 16-byte aligned, else 1."""
    tensors = [x for x in args if x is not None and x.dim() == 4]
    aligned = all(
        value % _VECTOR == 0
        for x in tensors
        for value in (x.data_ptr(), *(stride * x.element_size() for stride in _strides(x)))
    )
    return _VECTOR // tensors[0].element_size() if aligned else 1


def _precision(dtype: torch.dtype) -> str:
    """Precision of float32 matmuls: "ieee", or "tf32" if the user has allowed it for matmuls."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
