from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.backends.reference.common import elements, mean_per_sample, per_sample, wide


def m_step_loss(generated: Tensor, drift: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    # The residual is sigma drift. The difference alpha generated - (alpha generated + sigma drift)
    # would cancel most of its digits.
    return weight / 2 * mean_per_sample(wide(drift).square())


def m_step_loss_backward(
    grad: Tensor, drift: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor, dtype: torch.dtype
) -> Tensor:
    scale = grad * -weight * (alpha / sigma) / max(elements(drift), 1)
    return (per_sample(scale, drift) * wide(drift)).to(dtype)
