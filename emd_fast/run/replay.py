"""Repeats the E-step of one sample of a run on one process, whatever number the run had.

Noise depends on the global index of a sample (docs/algorithm.md), so the rest of the batch is not
needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emd_fast.config import ConfigError
from emd_fast.diffusion.rung import OnRung, plain
from emd_fast.em.types import EStep, LangevinStep
from emd_fast.io.files import write_atomic, write_text
from emd_fast.reporting import pictures
from emd_fast.run.distill import open_run
from emd_fast.run.folder import settings_of
from emd_fast.train.trainer import EMDTrainer

_COLUMNS = ("drift", "z", "eps", "delta", "g(z)")


@dataclass(frozen=True)
class Replay:
    """The repeated E-step of one sample.

    Args:
        step, sample: index of the step and of the sample.
        weights: where the weights come from, in words.
        rows: for each Langevin step, the RMS of drift, z and eps after it, and of delta and g(z)
            before it.
        before, after: (1, ...) the generator's samples g(z_0) and g(z_K).
        found: result of the E-step, a batch of one.
    """

    step: int
    sample: int
    weights: str
    rows: list[dict[str, float]]
    before: Tensor
    after: Tensor
    found: EStep

    def table(self) -> str:
        """Formats the result as text, with a row for each Langevin step."""
        found = self.found
        facts = [f"{name} {getattr(found, name).item():.6g}" for name in ("t", "alpha", "sigma")]
        cond = pytree.tree_map(lambda leaf: leaf[0].tolist() if isinstance(leaf, Tensor) else leaf, plain(found.cond))
        facts += [f"rung {found.cond.rung.item()}"] if isinstance(found.cond, OnRung) else []
        lines = [
            f"step {self.step}, sample {self.sample}; weights: {self.weights}",
            f"{', '.join(facts)}, condition {'none' if cond is None else cond}",
            "RMS after each Langevin step; of delta and g(z), before it",
            f"{'k':>5}" + "".join(f"{name:>13}" for name in _COLUMNS),
        ]
        for k, row in enumerate(self.rows):
            lines.append(f"{k:>5}" + "".join(f"{row[name]:>13.6g}" for name in _COLUMNS))
        return "\n".join(lines)

    def write(self, folder: Path) -> list[Path]:
        """Writes the table, and `before` and `after` as tensors. Returns the paths.

        Points in the plane, and finite images of one or three channels, are drawn as well.
        """
        folder.mkdir(parents=True, exist_ok=True)
        samples = {"before": self.before.cpu(), "after": self.after.cpu()}
        paths = [folder / "replay.txt", folder / "samples.pt"]
        write_text(paths[0], f"{self.table()}\n")
        write_atomic(paths[1], lambda file: torch.save(samples, file))
        if self.before.dim() == 2 and self.before.shape[1] == 2:
            paths.append(folder / "points.png")
            pictures.scatter(paths[-1], samples)
        for name, sample in samples.items():
            if sample.dim() == 4 and sample.shape[1] in (1, 3) and bool(sample.isfinite().all()):
                paths.append(folder / f"{name}.png")
                pictures.save_grid(paths[-1], sample)
        return paths


def replay(folder: Path, step: int, sample: int, *, catch_up: bool = False) -> Replay:
    """Repeats the E-step of one sample of a run.

    Noise, time and condition are those of the run, bit for bit. The weights are those of the last
    checkpoint at or before the step. In the run, the fake score is updated between the checkpoint
    and the E-step, even if the checkpoint is that of `step` itself; `catch_up` repeats these
    updates.

    Args:
        folder: the run folder.
        step: counted from 0; a checkpoint of `step` steps makes this step next.
        sample: index in the batch of all devices.
        catch_up: first repeats what the run did since the checkpoint, on the whole batch,
            including the fake-score updates of the step. The weights then equal those of the run
            up to the rounding of its sums over devices.

    Raises:
        ConfigError: the run does not have this step or sample.
        RunError: the folder holds no run, or no checkpoint at or before the step.
        CheckpointError: no such checkpoint can be read.
    """
    settings = settings_of(folder)
    for name, value, end in (("sample", sample, settings.emd.batch_size), ("step", step, 2**32)):
        if not 0 <= value < end:
            raise ConfigError(f"{name} must be in [0, {end}) in {folder}, got {value}")
    _, _, trainer = open_run(folder, up_to=step, trains=True)
    weights = f"the checkpoint of step {trainer.steps_done}"
    if catch_up:
        weights += f", and all that the run did from there to the E-step of step {step}"
        while trainer.steps_done < step:
            trainer.step()
        trainer.update_fake_score()
    elif trainer.steps_done < step:
        weights += f", {step - trainer.steps_done} steps earlier"
    else:
        weights += ", before the fake-score updates of the step"
    rows: list[dict[str, float]] = []
    before: list[Tensor] = []

    def watch(now: LangevinStep) -> None:
        values = (now.drift, now.z, now.eps, now.delta, now.x0)
        rows.append({name: _rms(value) for name, value in zip(_COLUMNS, values, strict=True)})
        before.append(now.x0)

    found = trainer.sample_posterior(step=step, samples=range(sample, sample + 1), watch=watch)
    return Replay(step, sample, weights, rows, before[0].float(), _generated(trainer, found), found)


@torch.no_grad()
def _generated(trainer: EMDTrainer, found: EStep) -> Tensor:
    return trainer.generator(found.z, found.cond).float()


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()
