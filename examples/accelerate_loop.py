"""The loop of plain_pytorch.py under Hugging Face Accelerate, on any number of devices:

    accelerate launch examples/accelerate_loop.py

Three things differ from plain_pytorch.py. `prepare` wraps networks and optimizers. `Noise` gets
the index of the first sample of this process. All random numbers come from the noise contract, so
that every process draws different ones.
"""

import math
import sys

import torch
from accelerate import Accelerator

from emd_fast import Denoiser, Noise, e_step, ops, schedules
from emd_fast.noise import NoiseStream
from emd_fast.teachers import gaussian_mixture
from emd_fast.teachers.mlp import PointGenerator, TimeMLP

BATCH = 128  # per device
ANGLES = torch.arange(8) * (2 * math.pi / 8)
MODES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


def to_nearest_mode(points: torch.Tensor) -> float:
    return torch.cdist(points.cpu(), MODES).amin(1).mean().item()


def main(steps: int = 600) -> tuple[float, float]:
    """Distils. Returns the mean distance of samples to the nearest mode, before and after."""
    accelerator = Accelerator()
    device = accelerator.device
    teacher = gaussian_mixture(torch.full((8,), 1 / 8), MODES, 0.15**2 * torch.eye(2).expand(8, 2, 2), schedules.EDM())
    teacher = teacher.to(device)
    fake_score = Denoiser(TimeMLP(2, 96, 3, seed=1), schedules.EDM(), "edm", sigma_data=math.sqrt(2))
    coefficients = fake_score.coefficients  # the wrapper of `prepare` does not expose the method
    generator = PointGenerator(2, 64, 2, seed=0)
    generator_optimizer = torch.optim.AdamW(generator.parameters(), lr=1e-3, betas=(0.0, 0.99))
    fake_score_optimizer = torch.optim.AdamW(fake_score.parameters(), lr=2e-3, betas=(0.0, 0.99))
    generator, fake_score, generator_optimizer, fake_score_optimizer = accelerator.prepare(
        generator, fake_score, generator_optimizer, fake_score_optimizer
    )
    noise = Noise(seed=0, first_sample=accelerator.process_index * BATCH, device=device)

    def draw(stream: int, substep: int = 0) -> torch.Tensor:
        return ops.normal((BATCH, 2), noise, stream=stream, substep=substep)

    def times(stream: int, substep: int = 0) -> torch.Tensor:
        """Draws sigma (BATCH,), log-uniform in [0.1, 3]."""
        u = ops.uniform((BATCH,), noise, stream=stream, substep=substep)
        return torch.exp(math.log(0.1) + u * math.log(30.0))

    shown = draw(NoiseStream.SHOWN)
    before = to_nearest_mode(generator(shown).detach())
    for step in range(steps):
        noise.set(step=step)

        for i in range(2):  # the fake score follows the generator
            t = times(NoiseStream.FAKE_SCORE_TIME, i)
            with torch.no_grad():
                x0 = generator(draw(NoiseStream.FAKE_SCORE_Z, i))
            x_t = ops.perturb(x0, torch.ones_like(t), t, noise=noise, stream=NoiseStream.FAKE_SCORE_EPS, substep=i)
            c_skip, c_out = coefficients(t)
            loss = ops.score_matching_loss(fake_score(x_t, t), x0, x_t, c_skip, c_out, 1 / c_out**2).mean()
            fake_score_optimizer.zero_grad()
            accelerator.backward(loss)
            fake_score_optimizer.step()

        z, eps, t = draw(NoiseStream.E_STEP_Z), draw(NoiseStream.E_STEP_EPS), times(NoiseStream.E_STEP_TIME)
        found = e_step(generator, teacher, fake_score, z, eps, t, steps=4, gamma_eps=0.16, gamma_z=1e-3, noise=noise)

        generated = generator(found.z)
        loss = ops.m_step_loss(generated, found.drift, found.alpha, found.sigma, found.sigma**2).mean()
        generator_optimizer.zero_grad()
        accelerator.backward(loss)
        generator_optimizer.step()

    return before, to_nearest_mode(generator(shown).detach())


if __name__ == "__main__":
    print("mean distance to the nearest mode: {:.3f} before, {:.3f} after".format(*main(*map(int, sys.argv[1:]))))
