import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch
from emd_fast.backends.triton.sums import store_sum, weighted_mean
from emd_fast.backends.triton.tile import load, of_sample, store, tile


@triton.jit
def _residual(output, x0, x_t, c_skip, c_out, sizes, sample, row, column, inside, PLANES: tl.constexpr):
    f = load(output, sizes, sample, row, column, inside, PLANES)
    clean = load(x0, sizes, sample, row, column, inside, PLANES)
    noisy = load(x_t, sizes, sample, row, column, inside, PLANES)
    return of_sample(c_skip, sample) * noisy + of_sample(c_out, sample) * f - clean


@triton.jit(do_not_specialize=["batch", "down", "across"])
def residual_squares_kernel(
    sums,
    output,
    x0,
    x_t,
    c_skip,
    c_out,
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
    r = _residual(output, x0, x_t, c_skip, c_out, sizes, sample, row, column, inside, PLANES)
    store_sum(sums, r * r, inside, batch, across, ROWS, PLANES)


def score_matching_loss(
    output: Tensor, x0: Tensor, x_t: Tensor, c_skip: Tensor, c_out: Tensor, weight: Tensor
) -> Tensor:
    sizes, tensors = launch.views(output, x0, x_t)
    return weighted_mean(
        residual_squares_kernel,
        *tensors,
        launch.by_sample(c_skip),
        launch.by_sample(c_out),
        like=output,
        sizes=sizes,
        weight=weight,
        factor=1.0,
    )


@triton.jit(do_not_specialize=["batch", "down", "across"])
def score_matching_loss_backward_kernel(
    out,
    grad,
    output,
    x0,
    x_t,
    c_skip,
    c_out,
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
    r = _residual(output, x0, x_t, c_skip, c_out, sizes, sample, row, column, inside, PLANES)
    scale = of_sample(grad, sample) * of_sample(weight, sample) * 2 * of_sample(c_out, sample)
    store(out, tl.div_rn(scale, elements) * r, sizes, sample, row, column, inside, PLANES)


def score_matching_loss_backward(
    grad: Tensor, output: Tensor, x0: Tensor, x_t: Tensor, c_skip: Tensor, c_out: Tensor, weight: Tensor
) -> Tensor:
    to_output = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    if not output.numel():
        return to_output
    sizes, (out_view, *tensors) = launch.views(to_output, output, x0, x_t)
    launch.run(
        score_matching_loss_backward_kernel,
        out_view,
        launch.by_sample(grad),
        *tensors,
        launch.by_sample(c_skip),
        launch.by_sample(c_out),
        launch.by_sample(weight),
        float(math.prod(sizes)),
        like=output,
        sizes=sizes,
    )
    return to_output
