"""The task "gmm": a ring of equal modes in the plane.

The teacher's score is exact, so that results show the algorithm without errors of a learned
teacher.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emd_fast import distributed, ops
from emd_fast.config import RunConfig
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.sampler import heun
from emd_fast.diffusion.schedules import EDM
from emd_fast.noise import Noise, NoiseStream
from emd_fast.reporting import pictures
from emd_fast.tasks import OnStep
from emd_fast.tasks.mixture_metrics import mixture_comparison, mixture_metrics
from emd_fast.teachers import gaussian_mixture
from emd_fast.teachers.mlp import PointGenerator, TimeMLP
from emd_fast.train.trainer import EMDTrainer


class Mixture:
    prompts = None
    device = torch.device("cpu")

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        mixture = config.mixture
        angles = torch.arange(mixture.modes) * (2 * math.pi / mixture.modes)
        self.weights = torch.full((mixture.modes,), 1 / mixture.modes)
        self.means = mixture.radius * torch.stack([angles.cos(), angles.sin()], dim=1)

    def make_teacher(self, folder: Path, on_step: OnStep | None) -> Denoiser:
        covariances = (self.config.mixture.std**2 * torch.eye(2)).expand(len(self.means), 2, 2)
        return gaussian_mixture(self.weights, self.means, covariances, EDM())

    def untrained_teacher(self) -> Denoiser:
        return self.make_teacher(Path(), None)

    def make_networks(self) -> tuple[nn.Module | None, Denoiser | None]:
        mixture, seed = self.config.mixture, self.config.emd.seed
        generator = PointGenerator(
            2,
            mixture.generator_width,
            mixture.generator_layers,
            seed,
            collapsed_at=tuple(self.means[0].tolist()) if mixture.collapsed else None,
        )
        # Variance of one coordinate: radius^2 / 2 of the ring plus std^2 of a mode.
        sigma_data = math.sqrt(mixture.radius**2 / 2 + mixture.std**2)
        network = TimeMLP(2, mixture.fake_score_width, mixture.fake_score_layers, seed + 1)
        return generator, Denoiser(network, EDM(), "edm", sigma_data=sigma_data, sample_shape=(2,))

    def open_references(self) -> None:
        pass

    def basis(self) -> dict[str, Any]:
        return {"samples": self.config.samples}

    def interim_metrics(self, trainer: EMDTrainer) -> dict[str, float]:
        samples = trainer.generate(self.config.samples)
        metrics = mixture_metrics(samples, self.weights, self.means, self.config.mixture.std, trainer.config.seed)
        return {name: metrics[name] for name in ("frechet", "recall", "precision", "modes", "total_variation")}

    def evaluate(self, trainer: EMDTrainer, untrained: EMDTrainer, folder: Path) -> dict[str, Any]:
        n, seed = self.config.samples, trainer.config.seed
        z = ops.normal((n, 2), Noise(seed), stream=NoiseStream.SHOWN)
        samples = {
            "teacher": heun(trainer.teacher, z),
            "init": untrained.generate(n, ema=False),
            "generator": trainer.generate(n),
        }
        distributed.on_main(lambda: pictures.scatter(folder / "samples" / "points.png", samples))
        return mixture_comparison(samples, self.weights, self.means, self.config.mixture.std, seed)
