import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.philox import normals
from emd_fast.backends.triton.tile import store, tile


@triton.jit(do_not_specialize=["stream", "substep", "batch", "down", "across"])
def normal_kernel(
    out,
    noise,
    stream,
    substep,
    batch,
    sizes,
    down,
    across,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
    RUN: tl.constexpr,
):
    sample, row, column, block, inside = tile(batch, sizes, down, across, ROWS, COLUMNS, PLANES, WIDE)
    n = normals(noise, stream, substep, sample, block, ROWS, COLUMNS, RUN)
    store(out, n, sizes, sample, row, column, inside, PLANES)


def normal(size: list[int], noise: Tensor, stream: int, substep: int, dtype: torch.dtype) -> Tensor:
    n = torch.empty(size, dtype=dtype, device=noise.device)
    if math.prod(size):
        sizes, (view,) = launch.views(n)
        launch.run(normal_kernel, view, noise, stream, substep, like=n, sizes=sizes, RUN=launch.neighbours(n))
    return n
