from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.backends.reference.common import per_sample, wide
from emd_fast.backends.reference.normal import normal


def perturb(
    x0: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    eps: Tensor | None,
    noise: Tensor | None,
    stream: int,
    substep: int,
    dtype: torch.dtype,
) -> Tensor:
    if eps is None:
        assert noise is not None
        eps = normal(list(x0.shape), noise, stream, substep, torch.float32)
    x_t = per_sample(alpha, x0) * wide(x0) + per_sample(sigma, x0) * wide(eps)
    return x_t.to(dtype).contiguous()
