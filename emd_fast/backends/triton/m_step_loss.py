import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.sums import store_sum, weighted_mean
from emd_fast.backends.triton.tile import load, of_sample, store, tile


@triton.jit(do_not_specialize=["batch", "down", "across"])
def drift_squares_kernel(
    sums,
    drift,
    batch,
    sizes,
    down,
    across,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample, row, column, _, inside = tile(batch, sizes, down, across, ROWS, COLUMNS, PLANES, WIDE)
    d = load(drift, sizes, sample, row, column, inside, PLANES)
    store_sum(sums, d * d, inside, batch, across, ROWS, PLANES)


def m_step_loss(generated: Tensor, drift: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    sizes, (drift_view,) = launch.views(drift)
    return weighted_mean(drift_squares_kernel, drift_view, like=drift, sizes=sizes, weight=weight, factor=0.5)


@triton.jit(do_not_specialize=["batch", "down", "across"])
def m_step_loss_backward_kernel(
    out,
    grad,
    drift,
    alpha,
    sigma,
    weight,
    elements,
    batch,
    sizes,
    down,
    across,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    sample, row, column, _, inside = tile(batch, sizes, down, across, ROWS, COLUMNS, PLANES, WIDE)
    ratio = tl.div_rn(of_sample(alpha, sample), of_sample(sigma, sample))
    scale = tl.div_rn(of_sample(grad, sample) * -of_sample(weight, sample) * ratio, elements)
    d = load(drift, sizes, sample, row, column, inside, PLANES)
    store(out, scale * d, sizes, sample, row, column, inside, PLANES)


def m_step_loss_backward(
    grad: Tensor, drift: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    to_generated = torch.empty(drift.shape, dtype=dtype, device=drift.device)
    if not drift.numel():
        return to_generated
    sizes, (out_view, drift_view) = launch.views(to_generated, drift)
    launch.run(
        m_step_loss_backward_kernel,
        out_view,
        launch.by_sample(grad),
        drift_view,
        launch.by_sample(alpha),
        launch.by_sample(sigma),
        launch.by_sample(weight),
        float(math.prod(sizes)),
        like=drift,
        sizes=sizes,
    )
    return to_generated
