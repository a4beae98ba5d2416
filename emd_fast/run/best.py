"""Periodic evaluation during training; keeps the best checkpoint by Fréchet distance."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from emd_fast import distributed
from emd_fast.config import RunConfig
from emd_fast.metrics.detector import DetectorError
from emd_fast.metrics.reference import BadReference
from emd_fast.reporting.progress import say
from emd_fast.tasks import Task
from emd_fast.train import checkpoint, run_checkpoints
from emd_fast.train.checkpoint import CheckpointError
from emd_fast.train.trainer import EMDTrainer


class Best:
    """The evaluations of a run, and the checkpoint `checkpoints/best` in its folder.

    All ranks create one and make the same calls. An evaluation draws its samples from the SHOWN
    noise stream and leaves training unchanged, bit for bit. The checkpoint with the lowest
    "frechet" is kept. That value is saved with the checkpoint, together with what it depends on
    (reference files, samples, seed), so that a resumed run compares like with like.
    """

    def __init__(self, trainer: EMDTrainer, task: Task, settings: RunConfig, folder: Path) -> None:
        self.path = run_checkpoints.best_of(folder / "checkpoints")
        self._trainer, self._task = trainer, task
        self._every, self._background = settings.evaluation.every, settings.background_checkpoints
        self._basis = {**task.basis(), "seed": settings.emd.seed}
        self.frechet = self._standing()

    def _standing(self) -> float:
        """The value of the existing best checkpoint; infinite if none is comparable."""
        if not run_checkpoints.exists(self.path):
            return math.inf
        try:
            _, figures, basis = _judged(self.path, checkpoint.facts(self.path))
        except CheckpointError as error:
            say(f"the best checkpoint is left out, the next evaluation replaces it: {error}")
            return math.inf
        if basis != self._basis:
            say(f"{self.path} was evaluated with other files or samples: the next evaluation replaces it")
            return math.inf
        return figures["frechet"]

    def due(self) -> bool:
        """Whether the last step completed another `evaluation.every` images, or the run."""
        config = self._trainer.config
        images = self._trainer.steps_done * config.batch_size
        return (
            images // self._every > (images - config.batch_size) // self._every
            or self._trainer.steps_done == config.steps
        )

    def evaluate(self) -> dict[str, float]:
        """Evaluates the generator and keeps it if it is the best so far. Returns a row for the log."""
        began = time.monotonic()
        try:
            mine = self._task.interim_metrics(self._trainer)
        except (BadReference, DetectorError):
            raise
        except ValueError as error:
            # All ranks have samples that are not finite. check_health decides whether the run
            # ends.
            say(f"the generator of step {self._trainer.steps_done} cannot be evaluated: {error}")
            mine = {"frechet": math.nan}
        figures = distributed.on_main(lambda: mine)  # all ranks must decide alike
        if figures["frechet"] < self.frechet:
            self.frechet = figures["frechet"]
            notes = {"figures": figures, "basis": self._basis}
            self._trainer.save(self.path, background=self._background, notes=notes)
        row = {f"evaluation_{name}": value for name, value in figures.items()}
        return {**row, "evaluation_seconds": time.monotonic() - began}


def best_of_run(folder: Path) -> dict[str, float] | None:
    """Step and metrics of the best checkpoint of a run; None if there is none that can be read."""
    path = run_checkpoints.best_of(folder / "checkpoints")
    if not run_checkpoints.exists(path):
        return None
    try:
        step, figures, _ = _judged(path, checkpoint.facts(path, verify=False))
    except CheckpointError:
        return None
    return {"step": step, **figures}


def _judged(path: Path, facts: dict[str, Any]) -> tuple[int, dict[str, float], dict[str, Any]]:
    """Step, figures and basis in the facts of a best checkpoint.

    Raises:
        CheckpointError: facts of another form.
    """
    match facts:
        case {"step": int() as step, "notes": {"figures": {"frechet": _} as figures, "basis": dict() as basis}}:
            if all(type(figure) in (int, float) for figure in figures.values()):
                return step, figures, basis
    raise CheckpointError(f"{path} does not say how it was judged")
