"""The ablation: Langevin sampling of (x, z) instead of (eps, z), in plain PyTorch."""

from __future__ import annotations

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
from emd_fast.em.types import EStep, LangevinSettings, LangevinStep, Networks, Watch
from emd_fast.noise import NoiseStream


def sample_x_z(
    networks: Networks,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    settings: LangevinSettings,
    watch: Watch | None = None,
) -> EStep:
    """Langevin steps on the density proportional to q(x) / p(x) N(x; alpha g(z), sigma^2) N(z).

        grad_x = delta - (x - alpha g(z)) / sigma^2                 step size gamma_eps sigma^2
        grad_z = J_g(z)^T alpha (x - alpha g(z)) / sigma^2 - z      step size gamma_z

    The chain starts at x = alpha g(z) + sigma eps. `drift` leaves out the noise that the chain
    added to x, and `eps` is (x_K - alpha g(z_K)) / sigma, so that the M-step is the same as for
    `e_step`. Arguments and errors are those of `e_step`; `watch` is called after each Langevin
    step.
    """
    generator, teacher, fake_score = networks
    _check.e_step(teacher, z, eps, t, cond, settings)
    noise, schedule = settings.noise, unwrap(teacher).schedule
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    difference = ScoreDifference(teacher, fake_score, t, cond, settings.null_cond, settings.guidance)
    z, noises, distance = z.detach().float(), eps.detach().float(), None
    alpha_x, sigma_x = column(alpha, eps), column(sigma, eps)
    exact = settings.integrator == "exact"
    step_x, step_z = _column(settings.gamma_eps, eps), _column(settings.gamma_z, z)
    with (
        gathered(*networks),
        frozen(generator) as g,
        weight_cache(*networks),
        conditioning_cache(),
        torch.no_grad(),
    ):
        mean = alpha_x * g(z, cond).float()
        x = mean + sigma_x * noises
        for k in range(settings.steps):
            if settings.moves_z:
                with torch.enable_grad():
                    latent = z.detach().requires_grad_()
                    mean = alpha_x * g(latent, cond).float()
            residual = (x - mean.detach()) / sigma_x**2
            n = ops.normal(x.shape, noise, stream=NoiseStream.LANGEVIN_EPS, substep=k)
            outputs = difference.outputs(x)
            delta = difference.of(x, outputs)
            if settings.measures and k == settings.steps - 1:
                distance = difference.teacher_distance(mean.detach() / alpha_x, x, outputs)
            x = x + step_x * sigma_x**2 * (delta - residual) + _noise_scale(step_x, exact) * sigma_x * n
            noises = (1 - step_x) * noises + _noise_scale(step_x, exact) * n
            if settings.moves_z:
                (z_grad,) = torch.autograd.grad(mean, latent, residual)
                m = ops.normal(z.shape, noise, stream=NoiseStream.LANGEVIN_Z, substep=k)
                z = z + step_z * (z_grad - z) + _noise_scale(step_z, exact) * m
            if watch is not None:
                eps = (x - alpha_x * g(z, cond).float()) / sigma_x
                watch(LangevinStep(k, mean.detach() / alpha_x, delta, z, eps, eps - noises))
        if settings.moves_z:
            mean = alpha_x * g(z, cond).float()
        eps = (x - mean) / sigma_x
    return EStep(z, eps, eps - noises, alpha, sigma, t, cond, distance)


def _noise_scale(step: Tensor, exact: bool) -> Tensor:
    return torch.sqrt(step * (2 - step) if exact else 2 * step)


def _column(gamma: float | Tensor, like: Tensor) -> Tensor:
    return column(torch.as_tensor(gamma, dtype=torch.float32, device=like.device), like)
