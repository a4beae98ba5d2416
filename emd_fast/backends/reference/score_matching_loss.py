from __future__ import annotations

from torch import Tensor

from emd_fast.backends.reference.common import elements, mean_per_sample, per_sample, wide


def _residual(output: Tensor, x0: Tensor, x_t: Tensor, c_skip: Tensor, c_out: Tensor) -> Tensor:
    return per_sample(c_skip, x0) * wide(x_t) + per_sample(c_out, x0) * wide(output) - wide(x0)


def score_matching_loss(
    output: Tensor, x0: Tensor, x_t: Tensor, c_skip: Tensor, c_out: Tensor, weight: Tensor
) -> Tensor:
    return weight * mean_per_sample(_residual(output, x0, x_t, c_skip, c_out).square())


def score_matching_loss_backward(
    grad: Tensor, output: Tensor, x0: Tensor, x_t: Tensor, c_skip: Tensor, c_out: Tensor, weight: Tensor
) -> Tensor:
    scale = grad * weight * 2 * c_out / max(elements(x0), 1)
    return (per_sample(scale, x0) * _residual(output, x0, x_t, c_skip, c_out)).to(output.dtype).contiguous()
