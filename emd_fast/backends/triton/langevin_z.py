import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.philox import normals
from emd_fast.backends.triton.tile import load, resolve_step_size, store, tile
from emd_fast.noise import NoiseStream


@triton.jit(do_not_specialize=["stream", "substep", "batch", "down", "across"])
def langevin_z_kernel(
    z,
    z_grad,
    step_size,
    step_size_per_sample,
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
    EXACT: tl.constexpr,
    RUN: tl.constexpr,
):
    sample, row, column, block, inside = tile(batch, sizes, down, across, ROWS, COLUMNS, PLANES, WIDE)
    step_size, noise_scale = resolve_step_size(step_size, step_size_per_sample, EXACT, sample)
    old = load(z, sizes, sample, row, column, inside, PLANES)
    pull = load(z_grad, sizes, sample, row, column, inside, PLANES)
    m = normals(noise, stream, substep, sample, block, ROWS, COLUMNS, RUN)
    store(z, old + step_size * (pull - old) + noise_scale * m, sizes, sample, row, column, inside, PLANES)


def langevin_z(
    z: Tensor,
    z_grad: Tensor,
    step_size: float,
    step_size_per_sample: Tensor | None,
    exact: bool,
    noise: Tensor,
    substep: int,
) -> None:
    if not z.numel():
        return
    sizes, (z_view, z_grad_view) = launch.views(z, z_grad)
    launch.run(
        langevin_z_kernel,
        z_view,
        z_grad_view,
        float(step_size),
        None if step_size_per_sample is None else launch.by_sample(step_size_per_sample),
        noise,
        NoiseStream.LANGEVIN_Z,
        substep,
        like=z,
        sizes=sizes,
        EXACT=exact,
        RUN=launch.neighbours(z_grad),
    )
