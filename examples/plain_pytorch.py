"""EM Distillation in a plain PyTorch training loop: three calls of emd_fast per step.

The teacher is a ring of eight modes with an exact score, so the example runs in seconds on a CPU.
Any emd_fast.Denoiser can replace it; generator and fake score then start as copies of the teacher.
"""

import math
import sys

import torch

from emd_fast import Denoiser, Noise, e_step, ops, schedules
from emd_fast.teachers import gaussian_mixture
from emd_fast.teachers.mlp import PointGenerator, TimeMLP

BATCH = 128
ANGLES = torch.arange(8) * (2 * math.pi / 8)
MODES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def to_nearest_mode(points: torch.Tensor) -> float:
    return torch.cdist(points, MODES).amin(1).mean().item()


def times() -> torch.Tensor:
    """Draws sigma (BATCH,), log-uniform in [0.1, 3]."""
    return torch.exp(torch.empty(BATCH).uniform_(math.log(0.1), math.log(3.0)))


def main(steps: int = 600) -> tuple[float, float]:
    """Distils. Returns the mean distance of samples to the nearest mode, before and after."""
    torch.manual_seed(0)
    teacher = gaussian_mixture(torch.full((8,), 1 / 8), MODES, 0.15**2 * torch.eye(2).expand(8, 2, 2), schedules.EDM())
    fake_score = Denoiser(TimeMLP(2, 96, 3, seed=1), schedules.EDM(), "edm", sigma_data=math.sqrt(2))
    generator = PointGenerator(2, 64, 2, seed=0)
    generator_optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3, betas=(0.0, 0.99))
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=2e-3, betas=(0.0, 0.99))
    noise = Noise(seed=0)
    shown = torch.randn(1000, 2)
    before = to_nearest_mode(generator(shown).detach())

    for step in range(steps):
        noise.set(step=step)

        for _ in range(2):  # the fake score follows the generator
            t, x0 = times(), generator(torch.randn(BATCH, 2)).detach()
            x_t = ops.perturb(x0, torch.ones_like(t), t, eps=torch.randn_like(x0))
            c_skip, c_out = fake_score.coefficients(t)
            loss = ops.score_matching_loss(fake_score(x_t, t), x0, x_t, c_skip, c_out, 1 / c_out**2).mean()
            fake_score_optimizer.zero_grad()
            loss.backward()
            fake_score_optimizer.step()

        z, eps = torch.randn(2, BATCH, 2)
        found = e_step(
            generator, teacher, fake_score, z, eps, times(), steps=4, gamma_eps=0.16, gamma_z=1e-3, noise=noise
        )

        generated = generator(found.z)
        loss = ops.m_step_loss(generated, found.drift, found.alpha, found.sigma, found.sigma**2).mean()
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()

    return before, to_nearest_mode(generator(shown).detach())


if __name__ == "__main__":
    print("mean distance to the nearest mode: {:.3f} before, {:.3f} after".format(*main(*map(int, sys.argv[1:]))))
