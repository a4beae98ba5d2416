from __future__ import annotations

import math

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the precision of the arithmetic: float32, or float64 where a check of the formulas passes that."""
    return x if x.dtype == torch.float64 else x.float()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped to broadcast against (B, ...)."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def mean_per_sample(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).mean(1)


def elements(x: Tensor) -> int:
    """The elements of one sample."""
    return x[0].numel() if len(x) else 0
