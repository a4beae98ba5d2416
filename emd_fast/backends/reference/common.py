from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in the precision of the arithmetic: float32, or float64 where a check of the formulas passes that."""
    return x if x.dtype == torch.float64 else x.float()


def per_sample(values: Tensor | float, like: Tensor) -> Tensor | float:
    """(B,) shaped to broadcast against (B, ...); a number stays one."""
    return values.reshape(-1, *[1] * (like.dim() - 1)) if isinstance(values, Tensor) else values


def mean_per_sample(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], -1).mean(1) if x.numel() else x.new_zeros(x.shape[0])


def elements(x: Tensor) -> int:
    """The elements of one sample."""
    return x[0].numel() if len(x) else 0
