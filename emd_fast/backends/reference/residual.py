from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.backends.reference.common import wide
from emd_fast.backends.reference.group_norm import layout


def residual(x: Tensor, skip: Tensor, bias: Tensor | None, skip_bias: Tensor | None, scale: float) -> Tensor:
    total = wide(x) + wide(skip)
    for values in (bias, skip_bias):
        if values is not None:
            total += wide(values).reshape(-1, *[1] * (x.dim() - 2))
    if scale != 1:
        total *= scale
    return total.to(torch.promote_types(x.dtype, skip.dtype)).contiguous(memory_format=layout(x))
