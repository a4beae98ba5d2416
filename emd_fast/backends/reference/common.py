from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Casts x to float32, the precision of the arithmetic. float64 (in tests) stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Reshapes (B,) to broadcast against (B, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def mean_per_sample(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).mean(1)


def elements(x: Tensor) -> int:
    """Number of elements of one sample."""
    return x[0].numel() if len(x) else 0
