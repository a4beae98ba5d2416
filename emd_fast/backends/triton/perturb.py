import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.philox import normals
from emd_fast.backends.triton.tile import load, of_sample, store, tile


@triton.jit(do_not_specialize=["stream", "substep", "batch", "down", "across"])
def perturb_kernel(
    out,
    x0,
    alpha,
    sigma,
    eps,
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
    x = load(x0, sizes, sample, row, column, inside, PLANES)
    if eps is None:
        n = normals(noise, stream, substep, sample, block, ROWS, COLUMNS, RUN)
    else:
        n = load(eps, sizes, sample, row, column, inside, PLANES)
    x_t = of_sample(alpha, sample) * x + of_sample(sigma, sample) * n
    store(out, x_t, sizes, sample, row, column, inside, PLANES)


def perturb(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    eps: Tensor | None,
    noise: Tensor | None,
    stream: int,
    substep: int,
    dtype: torch.dtype,
) -> Tensor:
    x_t = torch.empty(x0.shape, dtype=dtype, device=x0.device)
    if not x_t.numel():
        return x_t
    sizes, (out_view, x0_view, *eps_view) = launch.views(x_t, x0, *(() if eps is None else (eps,)))
    launch.run(
        perturb_kernel,
        out_view,
        x0_view,
        launch.by_sample(alpha),
        launch.by_sample(sigma),
        eps_view[0] if eps_view else None,
        noise if eps is None else None,
        stream,
        substep,
        like=x_t,
        sizes=sizes,
        RUN=launch.neighbours(x_t, x0),
    )
    return x_t
