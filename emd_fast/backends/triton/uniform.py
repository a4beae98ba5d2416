import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.philox import uniforms
from emd_fast.backends.triton.tile import store, tile


@triton.jit(do_not_specialize=["stream", "substep", "batch", "down", "across"])
def uniform_kernel(
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
    u = uniforms(noise, stream, substep, sample, block, ROWS, COLUMNS, RUN)
    store(out, u, sizes, sample, row, column, inside, PLANES)


def uniform(size: list[int], noise: Tensor, stream: int, substep: int) -> Tensor:
    u = torch.empty(size, dtype=torch.float32, device=noise.device)
    if math.prod(size):
        sizes, (view,) = launch.views(u)
        launch.run(uniform_kernel, view, noise, stream, substep, like=u, sizes=sizes, RUN=4)
    return u
