"""A teacher from a file: there is no data to compare with, so what is left to judge are pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from emd_fast import ops, report
from emd_fast.config import ConfigError, RunConfig
from emd_fast.denoiser import Denoiser
from emd_fast.noise import Noise, Stream
from emd_fast.sampler import heun
from emd_fast.tasks import OnStep
from emd_fast.teachers import edm
from emd_fast.trainer import EMDTrainer


class FromFile:
    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def make_teacher(self, folder: Path, on_step: OnStep | None) -> Denoiser:
        path = self.config.file.path
        if not path:
            raise ConfigError("give the teacher's checkpoint: --file.path FILE")
        teacher = edm.load(path, device="cuda" if torch.cuda.is_available() else "cpu")
        classes = teacher.null_cond or 0
        if classes != self.config.emd.num_classes:
            raise ConfigError(f"emd.num_classes must be {classes}, as {path} has it, got {self.config.emd.num_classes}")
        return teacher

    def make_networks(self) -> tuple[nn.Module | None, Denoiser | None]:
        return None, None

    @torch.no_grad()
    def evaluate(self, trainer: EMDTrainer, untrained: EMDTrainer, folder: Path | None) -> dict[str, Any]:
        n, classes = self.config.samples, self.config.emd.num_classes
        z = ops.normal(
            (n, *trainer.sample_shape), Noise(trainer.config.seed, device=trainer.device), stream=Stream.SHOWN
        )
        cond = torch.arange(n, device=z.device) % classes if classes else None
        samples = {
            "teacher": heun(trainer.teacher, z, cond, guidance=trainer.config.guidance),
            "init": untrained.generate(n, cond, ema=False),
            "student": trainer.generate(n, cond),
        }
        if folder is not None and trainer.sample_shape[0] in (1, 3):  # latents are no pictures
            for name, images in samples.items():
                report.save_grid(folder / "samples" / f"{name}.png", images)
        return {
            "n": n,
            "seed": trainer.config.seed,
            "mean": {name: x.mean().item() for name, x in samples.items()},
            "std": {name: x.std().item() for name, x in samples.items()},
        }
