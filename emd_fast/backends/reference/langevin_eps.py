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
    step_size_per_sample: Tensor | None,
    exact: bool,
    noise: Tensor,
    substep: int,
    cotangent_dtype: torch.dtype,
) -> Tensor:
    terms = [*([] if x is None else [x]), *outputs]
    delta = torch.zeros_like(eps)
    for k, term in zip(coefs.unbind(1), terms, strict=True):
        # Two roundings and no fused multiply-add: equal outputs must cancel to exactly 0.
        delta = delta + per_sample(k, eps) * wide(term)
    step, noise_scale = resolve_step_size(step_size, step_size_per_sample, exact, eps)
    pull = per_sample(sigma, eps) * delta
    drift.copy_((1 - step) * drift + step * pull)
    n = normal(list(eps.shape), noise, NoiseStream.LANGEVIN_EPS, substep, torch.float32)
    eps.copy_(eps + step * (pull - eps) + noise_scale * n)
    return (per_sample(alpha, eps) * delta).to(cotangent_dtype).contiguous()


def resolve_step_size(
    step_size: float, step_size_per_sample: Tensor | None, exact: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the step size, broadcastable to `like`, and the noise scale.

    The scale is sqrt(2 step_size) by Euler's method. The exact solution of the linear part has
    sqrt(step_size (2 - step_size)), with which the prior is stationary.

    A number is converted to the dtype of `like` first: the kernels compute the scale in float32.
    """
    if step_size_per_sample is None:
        step = torch.full((), step_size, dtype=like.dtype, device=like.device)
    else:
        step = per_sample(step_size_per_sample, like)
    return step, torch.sqrt(step * (2 - step) if exact else 2 * step)
