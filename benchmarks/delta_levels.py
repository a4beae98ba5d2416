"""Delta at several noise levels, to compare what changes it: the tables of fp8 and quantised_base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from emd_fast import ops
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.em.score_difference import ScoreDifference
from emd_fast.noise import NoiseStream
from emd_fast.train.trainer import EMDTrainer


@dataclass(frozen=True)
class Level:
    """Diffused samples of a generator at one noise level.

    Attributes:
        row: the log-SNR, and the RMS of delta over that of the teacher's score; a row of a table.
        x, t, cond: the samples, their times and conditions.
        guidance: of the teacher.
        delta: of the trainer's networks, float64.
    """

    row: dict[str, float]
    x: Tensor
    t: Tensor
    cond: Condition
    guidance: float | None
    delta: Tensor

    def difference(self, teacher: Denoiser, fake_score: Denoiser) -> ScoreDifference:
        """The score difference of two networks here."""
        return ScoreDifference(teacher, fake_score, self.t, self.cond, None, self.guidance)

    def cosine(self, found: Tensor) -> float:
        """Mean cosine of another delta to that of the trainer."""
        return cosine_similarity(found.double().flatten(1), self.delta.flatten(1)).mean().item()

    def error(self, found: Tensor) -> float:
        """RMS error of another delta over the RMS of that of the trainer."""
        return ((found - self.delta).norm() / self.delta.norm()).item()


@torch.no_grad()
def levels(trainer: EMDTrainer, samples: int, ratios: Tensor) -> Iterator[Level]:
    """Yields the same samples of the generator at each noise level sigma / alpha of `ratios` (n,)."""
    trainer.noise.set(step=0)
    cond = trainer.batches.micro_batch(None, 0, range(samples)).cond
    x0 = trainer.generate(samples, cond)
    eps = ops.normal(tuple(x0.shape), trainer.noise, stream=NoiseStream.SHOWN)
    schedule, guidance = trainer.schedule, trainer.config.guidance
    for ratio in ratios.tolist():
        log_snr = -2 * torch.full((samples,), ratio, dtype=torch.float64).log()
        t = schedule.t_from_log_snr(log_snr.float())
        x = ops.perturb(x0, schedule.alpha(t), schedule.sigma(t), eps=eps)
        delta = ScoreDifference(trainer.teacher, trainer.fake_score, t, cond, None, guidance).at(x).double()
        score = trainer.teacher.score(x, t, cond).double()
        row = {"log-SNR": log_snr[0].item(), "delta / score": (delta.norm() / score.norm()).item()}
        yield Level(row, x, t, cond, guidance, delta)


def ratios_of(trainer: EMDTrainer, n: int = 8) -> Tensor:
    """n noise levels over the range in which the trainer draws its times."""
    times = trainer.config.time_distribution
    return torch.logspace(torch.tensor(times.low).log10(), torch.tensor(times.high).log10(), n)


def table(rows: list[dict[str, float]]) -> str:
    """A table of Markdown with the keys of the first row as its head."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " ---: |" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(f"{value:.3g}" for value in row.values()) + " |" for row in rows])
