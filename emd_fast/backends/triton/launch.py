"""Launch of element-wise kernels: tile shape, collapsed strides and device."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emd_fast.backends.triton import tuning

TILE = 1024  # elements per program: 8 per thread of 4 warps, one 128-bit access of bfloat16
REDUCED_TILE = 2048  # for a program that stores one sum: more elements amortize the reduction
_WARPS = 4
_PLANE_ROWS = 32  # 64 bytes of bfloat16: two whole sectors of a channels_last tensor
_INT32 = 2**31
# No fused multiply-add: equal network outputs must give a delta of exactly 0.
OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Launch:
    """Parameters of one launch. A tile is `rows` by `columns` elements.

    Without `planes`, rows are samples and columns are their elements. With `planes`, rows and
    columns are the two dimensions of one sample (channels and positions of a channels_last
    tensor). The offset of an element then needs no division.
    """

    rows: int
    columns: int
    down: int  # tiles over the rows of one sample
    across: int  # tiles over the columns
    programs: int
    planes: bool
    wide: bool  # element indices inside a sample need 64 bits; memory offsets always have 64
    warps: int


def pick(batch: int, sizes: Sequence[int], tile: int = TILE, warps: int = _WARPS) -> Launch:
    """Launch parameters for samples of these collapsed sizes.

    They depend on the arguments only, and the tile does not depend on the batch size. So all ranks
    choose the same tile, and a sum over a sample is equal in every batch.

    Args:
        tile: maximum number of elements per program.
        warps: maximum number of warps per program.
    """
    elements = math.prod(sizes)
    # The four words of a Philox block belong to four consecutive elements. They must be in one
    # row.
    planes = len(sizes) == 2 and sizes[1] % 4 == 0
    if planes:
        rows = min(_power_of_two(sizes[0]), _PLANE_ROWS)
        columns = min(max(_power_of_two(sizes[1]), 8), tile // rows)
        down, across = _ceil(sizes[0], rows), _ceil(sizes[1], columns)
        programs = batch * down * across
    else:
        columns = min(max(_power_of_two(elements), 8), tile)
        rows = tile // columns
        down, across = 1, _ceil(elements, columns)
        programs = _ceil(batch, rows) * across
    # Keeps the elements per thread in a smaller tile.
    warps = max(warps * rows * columns // tile, 1)
    return Launch(rows, columns, down, across, programs, planes, wide=elements + 2 * tile >= _INT32, warps=warps)


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Merges dimensions of a sample where the strides of all tensors permit.

    Args:
        shape: shape of one sample.
        strides: strides of each tensor within a sample.

    Returns:
        The merged sizes, and the strides of each tensor. If all tensors are contiguous, this is
        one dimension of stride 1.
    """
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for d, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(k[-1] == s[d] * size for k, s in zip(kept, strides, strict=True)):
            sizes[-1] *= size
            for k, s in zip(kept, strides, strict=True):
                k[-1] = s[d]
        else:
            sizes.append(size)
            for k, s in zip(kept, strides, strict=True):
                k.append(s[d])
    if not sizes:
        return (1,), [(1,) for _ in strides]
    return tuple(sizes), [tuple(k) for k in kept]


def views(*tensors: Tensor) -> tuple[tuple[int, ...], list[tuple[Any, ...]]]:
    """Collapsed sizes of a sample, and per tensor the argument (tensor, batch stride, strides)."""
    shape = tensors[0].shape
    sizes, strides = collapse(shape[1:], *(x.stride()[1:] for x in tensors))
    return sizes, [(x, x.stride(0), s) for x, s in zip(tensors, strides, strict=True)]


def by_sample(x: Tensor) -> tuple[Any, ...]:
    """Kernel argument for a tensor (B,) or (B, k): (tensor, strides...)."""
    return (x, *x.stride())


def neighbours(*tensors: Tensor) -> int:
    """Consecutive elements that a thread should draw: 128 bits of the narrowest dtype."""
    return 8 if any(x.element_size() == 2 for x in tensors) else 4


def run(
    kernel: Any,
    *args: Any,
    like: Tensor,
    sizes: tuple[int, ...],
    tile: int | None = None,
    **constants: Any,
) -> None:
    """Launches kernel(*args, batch, sizes, down, across, ...) over samples of these sizes.

    Args:
        like: a tensor with the batch size and the device of the call.
        tile: fixed tile size, for a kernel whose result depends on it. Others may be tuned.
    """

    def launched(args: tuple[Any, ...], launch: Launch) -> None:
        submit(
            kernel,
            launch.programs,
            (*args, len(like), sizes, launch.down, launch.across),
            {
                "ROWS": launch.rows,
                "COLUMNS": launch.columns,
                "PLANES": launch.planes,
                "WIDE": launch.wide,
                **constants,
            },
            launch.warps,
            like.device,
        )

    def tuned(args: tuple[Any, ...], choice: tuning.Choice) -> None:
        launched(args, pick(len(like), sizes, *choice))

    if tile is None and tuning.wanted(like.device):
        tuned(args, tuning.fastest(kernel, args, tuned, like.device))
    else:
        launched(args, pick(len(like), sizes, tile or TILE))


def submit(
    kernel: Any,
    programs: int,
    args: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
    device: torch.device,
    options: Mapping[str, Any] = OPTIONS,
) -> None:
    """Launches a kernel on the device of its tensors, which need not be the current device."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **constants, num_warps=warps, **options)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ceil(n: int, by: int) -> int:
    return -(-n // by)
