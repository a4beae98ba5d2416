"""Tasks: what a recipe distils, where its networks come from, and which metrics its samples get."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from emd_fast.config import RunConfig
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.train.trainer import EMDTrainer


class OnStep(Protocol):
    """Called after each step of making a teacher or its table of prompts. It may raise to stop."""

    def __call__(self, step: int, total: int, loss: float, name: str = "teacher", kept: bool = False) -> None:
        """`step` of `total` steps are done; `kept` says whether a later run goes on from there."""


class Task(Protocol):
    """One task. Constructing it trains and reads nothing."""

    prompts: Any  # conditions for the trainer; set by make_teacher

    @property
    def device(self) -> torch.device:
        """Where the networks run."""

    def __init__(self, config: RunConfig) -> None: ...

    def make_teacher(self, folder: Path, on_step: OnStep | None) -> Denoiser:
        """Returns the teacher: read from the run folder if it is there, else made and written there."""

    def untrained_teacher(self) -> Denoiser:
        """Returns a teacher of the right architecture, with any weights.

        Memory needs are computed from it before the teacher is made. It is on the meta device
        unless the architecture is known only from a file.
        """

    def make_networks(self) -> tuple[nn.Module | None, Denoiser | None]:
        """Returns generator and fake score; None stands for a copy of the teacher."""

    def open_references(self) -> None:
        """Reads the files that metrics need, so that a wrong file is reported before the training."""

    def basis(self) -> dict[str, Any]:
        """Returns what `interim_metrics` depend on besides weights and seed, as plain values."""

    def interim_metrics(self, trainer: EMDTrainer) -> dict[str, float]:
        """Returns the generator's metrics during training; "frechet" selects the best checkpoint."""

    def evaluate(self, trainer: EMDTrainer, untrained: EMDTrainer, folder: Path) -> dict[str, Any]:
        """Returns the contents of metrics.json. Rank 0 writes pictures into folder / "samples"."""


def task_of(config: RunConfig) -> Task:
    """Builds the task that `config.task` names."""
    from emd_fast.tasks.digits import Digits
    from emd_fast.tasks.fashion import Fashion
    from emd_fast.tasks.gmm import Mixture
    from emd_fast.tasks.pretrained import Pretrained

    tasks: dict[str, Callable[[RunConfig], Task]] = {
        "digits": Digits,
        "fashion": Fashion,
        "gmm": Mixture,
        "pretrained": Pretrained,
    }
    return tasks[config.task](config)
