"""The E-step: Langevin sampling of (eps, z), with noise cancellation in drift.

`sample_eps_z` is the algorithm; `e_step` checks its arguments and calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.cache.conditioning import conditioning_cache
from emd_fast.cache.weights import weight_cache
from emd_fast.diffusion.denoiser import Condition, column, unwrap
from emd_fast.distributed import gathered
from emd_fast.em import _check
from emd_fast.em.frozen import frozen
from emd_fast.em.score_difference import ScoreDifference
from emd_fast.em.types import EStep, GeneratorLike, LangevinSettings, LangevinStep, Networks, Watch
from emd_fast.noise import Noise


def sample_eps_z(
    networks: Networks,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    settings: LangevinSettings,
    watch: Watch | None = None,
) -> EStep:
    """Runs the chain of `e_step` without argument checks, so the host never waits for the device.

    `watch` is called after each Langevin step.
    """
    generator, teacher, fake_score = networks
    schedule = unwrap(teacher).schedule
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    difference = ScoreDifference(teacher, fake_score, t, cond, settings.null_cond, settings.guidance)
    z, eps = _copied(z), _copied(eps)
    drift = torch.zeros_like(eps)
    generated = distance = None
    if settings.keeps_pass and not settings.moves_z:
        with torch.enable_grad():
            generated = generator(z, cond)
    with gathered(*networks), frozen(generator) as g, weight_cache(*networks), conditioning_cache():
        x0 = None if generated is None else generated.detach()
        for k in range(settings.steps):
            if settings.moves_z:
                with torch.enable_grad():
                    latent = z.detach().requires_grad_()
                    x0 = g(latent, cond)
            elif x0 is None:
                with torch.no_grad():
                    x0 = g(z, cond)
            with torch.no_grad():
                x = ops.perturb(x0.detach(), alpha, sigma, eps=eps, dtype=torch.float32)
                outputs = difference.outputs(x)
                if settings.measures and k == settings.steps - 1:
                    distance = difference.teacher_distance(x0.detach(), x, outputs)
                alpha_delta = ops.langevin_eps(
                    eps,
                    drift,
                    x if difference.needs_x else None,
                    outputs,
                    difference.coefs,
                    alpha,
                    sigma,
                    step_size=settings.gamma_eps,
                    integrator=settings.integrator,
                    noise=settings.noise,
                    substep=k,
                    cotangent_dtype=x0.dtype,
                )
            if settings.moves_z:
                (z_grad,) = torch.autograd.grad(x0, latent, alpha_delta)
                ops.langevin_z(
                    z,
                    z_grad,
                    step_size=settings.gamma_z,
                    integrator=settings.integrator,
                    noise=settings.noise,
                    substep=k,
                )
            if watch is not None:
                delta = alpha_delta.float() / column(alpha, alpha_delta)
                watch(LangevinStep(k, x0.detach(), delta, z, eps, drift))
    return EStep(z, eps, drift, alpha, sigma, t, cond, distance, generated)


def _copied(x: Tensor) -> Tensor:
    """A float32 contiguous copy, outside of autograd."""
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(x.detach())


def e_step(
    generator: GeneratorLike,
    teacher: Any,
    fake_score: Any,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    *,
    cond: Condition = None,
    null_cond: Condition = None,
    guidance: float | Tensor | None = None,
    steps: int,
    gamma_eps: float | Tensor,
    gamma_z: float | Tensor,
    integrator: str = "euler",
    noise: Noise,
) -> EStep:
    """Langevin steps on the density proportional to q(x_t) / p(x_t) N(eps) N(z).

    Here x_t = alpha g(z) + sigma eps, and q and p are the diffused densities of teacher and
    generator. One step is one pass of generator, teacher and fake score, and one backward pass of
    the generator to its input. If gamma_z is the number 0, the generator runs once and has no
    backward pass. No parameter gets a gradient. Memory does not grow with `steps`.

    Args:
        generator: callable (z, cond) -> x.
        teacher, fake_score: Denoisers of one schedule, bare or wrapped by DDP, FSDP2 (gathered
            once) or torch.compile.
        z, eps: (B, ...), floating; not modified.
        t: (B,) float32, fixed during the chain.
        cond: None, a tensor or a pytree of tensors batched on dimension 0.
        null_cond: the unconditional condition for guidance; the teacher's own when None.
        guidance: None, a number or (B,) float32: F = F_u + guidance (F_c - F_u) for the teacher.
        steps: K >= 1.
        gamma_eps, gamma_z: step sizes, a number or (B,) float32, in (0, 1) and [0, 1).
        integrator: "euler", the step as published, or "exact", which solves its linear part: where
            delta is 0 the prior N(0, I) is stationary.
        noise: Langevin noise, streams 2 and 3 at substeps 0 .. K - 1.

    Raises:
        TypeError, ValueError: an argument has a wrong type, shape or range. Nothing is computed
            then.

    Source: Xie et al., arXiv 2405.16852, algorithm 1; docs/algorithm.md.
    """
    settings = LangevinSettings(steps, gamma_eps, gamma_z, noise, guidance, null_cond, integrator)
    _check.e_step(teacher, z, eps, t, cond, settings)
    return sample_eps_z((generator, teacher, fake_score), z, eps, t, cond, settings)
