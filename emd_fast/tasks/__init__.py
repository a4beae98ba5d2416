"""What a recipe distils: where its networks come from, and what its samples are judged by."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from emd_fast.config import RunConfig
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.train.trainer import EMDTrainer

OnStep = Callable[[int, int, float], None]  # steps done, steps in all, loss


class Task(Protocol):
    """One task. Building it is cheap; nothing is trained or read before it is asked for."""

    prompts: Any  # of the trainer; known once the teacher is made

    def __init__(self, config: RunConfig) -> None: ...

    def make_teacher(self, folder: Path, on_step: OnStep | None) -> Denoiser:
        """The teacher: read from the run folder where it is there already, made (and written there) otherwise."""

    def untrained_teacher(self) -> Denoiser:
        """The teacher's architecture, whatever its weights: what it will need can be told before it is made. On the
        meta device where nothing has to be read to know it."""

    def make_networks(self) -> tuple[nn.Module | None, Denoiser | None]:
        """Generator and student; None for copies of the teacher."""

    def prepare_to_judge(self) -> None:
        """Reads what samples are judged by, so that a wrong file is found before the training."""

    def basis(self) -> dict[str, Any]:
        """What the figures of `judge` depend on besides the weights and the seed: plain values."""

    def judge(self, trainer: EMDTrainer) -> dict[str, float]:
        """The student alone, in the middle of the training: "frechet", which decides, and what else there is."""

    def evaluate(self, trainer: EMDTrainer, untrained: EMDTrainer, folder: Path | None) -> dict[str, Any]:
        """What goes into metrics.json; pictures are written into folder / "samples" where a folder is given."""


def task_of(config: RunConfig) -> Task:
    from emd_fast.tasks.digits import Digits
    from emd_fast.tasks.gmm import Mixture
    from emd_fast.tasks.pretrained import Pretrained

    tasks: dict[str, Callable[[RunConfig], Task]] = {"digits": Digits, "gmm": Mixture, "pretrained": Pretrained}
    return tasks[config.task](config)
