from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.backends.reference.common import per_sample, wide
from emd_fast.backends.reference.normal import normal
from emd_fast.noise import NoiseStream


def langevin_eps(
    eps: Tensor,
    drift: Tensor,
    x: Tensor | None,
    outputs: list[Tensor],
    coefs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    step_size: float,
    step_sizes: Tensor | None,
    noise: Tensor,
    substep: int,
    cotangent_dtype: torch.dtype,
) -> Tensor:
    terms = [*([] if x is None else [x]), *outputs]
    delta = torch.zeros_like(eps)
    for k, term in zip(coefs.unbind(1), terms, strict=True):
        delta = delta + per_sample(k, eps) * wide(term)  # two roundings: equal outputs must cancel to exactly 0
    gamma, root = step(step_size, step_sizes, eps)
    pull = per_sample(sigma, eps) * delta
    drift.copy_((1 - gamma) * drift + gamma * pull)
    n = normal(list(eps.shape), noise, NoiseStream.LANGEVIN_EPS, substep, torch.float32)
    eps.copy_(eps + gamma * (pull - eps) + root * n)
    return (per_sample(alpha, eps) * delta).to(cotangent_dtype).contiguous()


def step(step_size: float, step_sizes: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """gamma and sqrt(2 gamma), in float32 as the kernels have them."""
    if step_sizes is None:
        gamma = torch.full((), step_size, dtype=like.dtype, device=like.device)
    else:
        gamma = per_sample(step_sizes, like)
    return gamma, torch.sqrt(2 * gamma)
