"""The M-step: the generator moves towards where the E-step took its samples."""

from __future__ import annotations

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.em.types import EStep, GeneratorLike

# What a sample weighs, by its alpha and sigma. The gradient to g is -weight (alpha / sigma) drift / n.
WEIGHTINGS = {
    "one": lambda alpha, sigma: torch.ones_like(sigma),
    "sigma": lambda alpha, sigma: sigma,
    "sigma2": lambda alpha, sigma: sigma.square(),
    "sigma_over_alpha": lambda alpha, sigma: sigma / alpha,
}


def m_step(generator: GeneratorLike, sampled: EStep, weight: Tensor, *, noise_cancellation: bool = True) -> Tensor:
    """The regression of alpha g(z_K) on alpha g(z_K) + sigma drift, target fixed, for each sample.

    Args:
        generator: the one that the E-step ran, with its gradients.
        sampled: what the E-step returned.
        weight: (B,) float32.
        noise_cancellation: regress on drift; on eps_K when False.

    Returns:
        (B,) float32, differentiable in the generator's parameters.
    """
    generated = generator(sampled.z, sampled.cond)
    drift = sampled.drift if noise_cancellation else sampled.eps
    return ops.m_step_loss(generated, drift, sampled.alpha, sampled.sigma, weight)
