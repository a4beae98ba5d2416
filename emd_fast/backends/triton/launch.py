"""How a kernel is launched: the shape of its tiles, the strides it reads at, and the device it runs on."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emd_fast.backends.triton import tuning

TILE = 1024  # elements a program: 8 a thread of 4 warps, which is one 128-bit access of bfloat16
REDUCED_TILE = 2048  # where a program leaves a single sum behind, more of them make its last steps cheaper
_WARPS = 4
_PLANE_ROWS = 32  # 64 bytes of bfloat16: two whole sectors of a channels_last tensor
_INT32 = 2**31
# No product is contracted into a sum: equal outputs must give a delta of exactly 0.
OPTIONS = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Launch:
    """The choices of one launch. A tile is `rows` by `columns` elements.

    Rows are samples and columns their elements; or, with `planes`, rows and columns are the two dimensions of one
    sample (channels and positions, for channels_last tensors), which needs no division to find an element in memory.
    """

    rows: int
    columns: int
    down: int  # tiles over the rows of one sample
    across: int  # tiles over the columns
    programs: int
    planes: bool
    wide: bool  # the elements of one sample need 64-bit numbers; offsets in memory always have them
    warps: int


def pick(batch: int, sizes: Sequence[int], tile: int = TILE, warps: int = _WARPS) -> Launch:
    """The launch for samples of these collapsed sizes, of programs with (at most) so many elements and warps.

    It depends on nothing but its arguments, and the tile not even on the batch: every rank takes the same, and a sum
    over a sample is the same in every batch.
    """
    elements = math.prod(sizes)
    # The four words of a Philox block serve four neighbours, which must lie in one row of the tile.
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
    warps = max(warps * rows * columns // tile, 1)  # a thread has as many elements in a tile of a small image
    return Launch(rows, columns, down, across, programs, planes, wide=elements + 2 * tile >= _INT32, warps=warps)


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The fewest dimensions that describe one sample in all tensors at once.

    Args:
        shape: of one sample. strides: those of each tensor within a sample.

    Returns:
        sizes, and for each tensor its strides; contiguous tensors have one dimension of stride 1.
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
    """The collapsed sizes of a sample, and what a kernel takes for each tensor: (tensor, batch stride, strides)."""
    shape = tensors[0].shape
    sizes, strides = collapse(shape[1:], *(x.stride()[1:] for x in tensors))
    return sizes, [(x, x.stride(0), s) for x, s in zip(tensors, strides, strict=True)]


def by_sample(x: Tensor) -> tuple[Any, ...]:
    """What a kernel takes for a tensor (B,) or (B, k): it, and its strides."""
    return (x, *x.stride())


def neighbours(*tensors: Tensor) -> int:
    """How many neighbours one thread should draw: as many as it needs for 128 bits of the narrowest tensor."""
    return 8 if any(x.element_size() == 2 for x in tensors) else 4


def run(
    kernel: Any,
    *args: Any,
    like: Tensor,
    sizes: tuple[int, ...],
    tile: int | None = None,
    **constants: Any,
) -> None:
    """Launches kernel(*args, batch, sizes, down, across, ...) over samples of these sizes, on the device of `like`.

    `tile` is given where the result depends on it; other kernels may be tuned.
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
    """The one place where a kernel is launched: on the tensors' device, which need not be the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(programs,)](*args, **constants, num_warps=warps, **options)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _ceil(n: int, by: int) -> int:
    return -(-n // by)
