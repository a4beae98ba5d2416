"""Score identity distillation (SiD) in the form of an E-step, so that the M-step takes its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.cache.conditioning import conditioning_cache
from emd_fast.cache.weights import weight_cache
from emd_fast.diffusion.denoiser import Condition, column, unwrap
from emd_fast.distributed import gathered
from emd_fast.em.frozen import frozen
from emd_fast.em.score_difference import ScoreDifference
from emd_fast.em.types import EStep, LangevinSettings, LangevinStep, Networks, Watch

ALPHA = 1.2
"""The weight of the squared difference in SiD's loss, as published."""


def sample_sid(
    networks: Networks,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    settings: LangevinSettings,
    watch: Watch | None = None,
) -> EStep:
    """Computes the gradient of SiD's loss to x = g(z), as a drift that the M-step regresses on.

        L = sum (D_teacher - D_fake) ((D_teacher - x) - 1.2 (D_teacher - D_fake)),   x_t = alpha x + sigma eps
        drift = -(alpha / sigma) dL/dx

    dL/dx goes through the inputs of teacher and fake score. The M-step with weight w gives x the gradient
    w (alpha / sigma)^2 dL/dx / n, so that `weighting = "adaptive"` is SiD's own. There is no chain: z and eps
    stay, and of `settings` only guidance, null_cond, measures and keeps_pass count.

    Source: Zhou et al., arXiv 2404.04057.
    """
    generator, teacher, fake_score = networks
    schedule = unwrap(teacher).schedule
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    difference = ScoreDifference(teacher, fake_score, t, cond, settings.null_cond, settings.guidance)
    z, eps, generated = z.detach().float(), eps.detach().float(), None
    if settings.keeps_pass:
        with torch.enable_grad():
            generated = generator(z, cond)
    with gathered(*networks), frozen(generator) as g, frozen(fake_score), weight_cache(*networks), conditioning_cache():
        with torch.no_grad():
            x0 = (g(z, cond) if generated is None else generated).detach().float()
        with torch.enable_grad():
            x = x0.clone().requires_grad_()
            x_t = column(alpha, x) * x + column(sigma, x) * eps
            outputs = difference.outputs(x_t)
            by_teacher = difference.denoised_by_teacher(x_t, outputs)
            apart = by_teacher - difference.denoised_by_fake_score(x_t, outputs)
            loss = (apart * (by_teacher - x - ALPHA * apart)).sum()
        (gradient,) = torch.autograd.grad(loss, x)
    drift = -column(alpha / sigma, gradient) * gradient
    distance = (x0 - by_teacher.detach()).abs().flatten(1).mean(1) if settings.measures else None
    if watch is not None:
        delta = apart.detach() * column(alpha / sigma.square(), apart)
        watch(LangevinStep(0, x0, delta, z, eps, drift))
    return EStep(z, eps, drift, alpha, sigma, t, cond, distance, generated)
