"""M-step: regression of the generator on the result of the E-step."""

from __future__ import annotations

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.em.types import EStep, GeneratorLike

# Weight of a sample as a function of alpha and sigma, each (B,). The gradient with respect to g is
# -weight (alpha / sigma) drift / n for n elements per sample.
WEIGHTINGS = {
    "one": lambda alpha, sigma: torch.ones_like(sigma),
    "sigma": lambda alpha, sigma: sigma,
    "sigma2": lambda alpha, sigma: sigma.square(),
    "sigma_over_alpha": lambda alpha, sigma: sigma / alpha,
}


def m_step(generator: GeneratorLike, sampled: EStep, weight: Tensor, *, noise_cancellation: bool = True) -> Tensor:
    """Loss per sample of regressing alpha g(z_K) on alpha g(z_K) + sigma drift, target detached.

    Args:
        generator: callable (z, cond) -> x, the generator of the E-step.
        sampled: result of the E-step.
        weight: (B,) float32.
        noise_cancellation: use drift in the target. False uses eps_K.

    Returns:
        Losses (B,) float32, differentiable in the parameters of the generator.
    """
    generated = generator(sampled.z, sampled.cond)
    drift = sampled.drift if noise_cancellation else sampled.eps
    return ops.m_step_loss(generated, drift, sampled.alpha, sampled.sigma, weight)
