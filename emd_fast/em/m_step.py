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
_LEAST_DISTANCE = 1e-5  # of a sample that the teacher does not change


def weight_of(weighting: str, sampled: EStep) -> Tensor:
    """Weight (B,) float32 of each sample in the M-step.

    "adaptive" is (sigma / alpha)^2 divided by the mean of |x - D_teacher(x_t)| over the sample. With
    `objective = "vsd"` the update of x is then D_teacher - D_fake divided by that mean, as in DMD (Yin et
    al., arXiv 2311.18828). The other names are those of WEIGHTINGS.

    Raises:
        ValueError: "adaptive" of an E-step that did not measure the distance.
    """
    if weighting != "adaptive":
        return WEIGHTINGS[weighting](sampled.alpha, sampled.sigma)
    if sampled.teacher_distance is None:
        raise ValueError(
            'the weighting "adaptive" needs an E-step with teacher_distance: sample it with measures = True'
        )
    return (sampled.sigma / sampled.alpha).square() / sampled.teacher_distance.clamp(min=_LEAST_DISTANCE)


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
