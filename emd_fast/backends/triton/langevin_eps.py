import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.philox import normals
from emd_fast.backends.triton.tile import load, of_sample, resolve_step_size, store, tile
from emd_fast.noise import NoiseStream


@triton.jit
def _coefficient(coefs, sample, i: tl.constexpr):
    return tl.load(coefs[0] + sample * coefs[1] + i * coefs[2])


@triton.jit(do_not_specialize=["stream", "substep", "batch", "down", "across"])
def langevin_eps_kernel(
    eps,
    drift,
    cotangent,
    terms,
    coefs,
    alpha,
    sigma,
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
    # launch.OPTIONS disables fused multiply-add: equal outputs must cancel to exactly 0.
    delta = _coefficient(coefs, sample, 0) * load(terms[0], sizes, sample, row, column, inside, PLANES)
    for i in tl.static_range(1, len(terms)):
        term = load(terms[i], sizes, sample, row, column, inside, PLANES)
        delta = delta + _coefficient(coefs, sample, i) * term
    store(cotangent, of_sample(alpha, sample) * delta, sizes, sample, row, column, inside, PLANES)

    step_size, noise_scale = resolve_step_size(step_size, step_size_per_sample, EXACT, sample)
    pull = of_sample(sigma, sample) * delta
    d = load(drift, sizes, sample, row, column, inside, PLANES)
    store(drift, (1 - step_size) * d + step_size * pull, sizes, sample, row, column, inside, PLANES)
    e = load(eps, sizes, sample, row, column, inside, PLANES)
    n = normals(noise, stream, substep, sample, block, ROWS, COLUMNS, RUN)
    store(eps, e + step_size * (pull - e) + noise_scale * n, sizes, sample, row, column, inside, PLANES)


def langevin_eps(
    eps: Tensor,
    drift: Tensor,
    x: Tensor | None,
    outputs: list[Tensor],
    coefs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    step_size: float,
    step_size_per_sample: Tensor | None,
    exact: bool,
    noise: Tensor,
    substep: int,
    cotangent_dtype: torch.dtype,
) -> Tensor:
    cotangent = torch.empty(eps.shape, dtype=cotangent_dtype, device=eps.device)
    if not eps.numel():
        return cotangent
    terms = [*([] if x is None else [x]), *outputs]
    sizes, (eps_view, drift_view, cotangent_view, *term_views) = launch.views(eps, drift, cotangent, *terms)
    launch.run(
        langevin_eps_kernel,
        eps_view,
        drift_view,
        cotangent_view,
        tuple(term_views),
        launch.by_sample(coefs),
        launch.by_sample(alpha),
        launch.by_sample(sigma),
        float(step_size),
        None if step_size_per_sample is None else launch.by_sample(step_size_per_sample),
        noise,
        NoiseStream.LANGEVIN_EPS,
        substep,
        like=eps,
        sizes=sizes,
        EXACT=exact,
        RUN=launch.neighbours(cotangent, *terms),
    )
    return cotangent
