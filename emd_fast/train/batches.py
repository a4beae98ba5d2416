"""Random inputs of a training step: z, eps, times, conditions, each from its own noise stream.

docs/algorithm.md lists the streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emd_fast import distributed, ops
from emd_fast.config import EMDConfig, StepSize, TimeDistribution
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.noise import Noise, NoiseStream
from emd_fast.train.conditions import Table
from emd_fast.train.sample_sizes import SampleSizes, Shape
from emd_fast.train.times import at_size, log_ratios


@dataclass(frozen=True)
class MicroBatch:
    """Samples of the global batch that one rank takes through the networks at once.

    Attributes:
        first: index of the first sample in the batch of all ranks.
        size: number of samples.
        cond: their conditions, batched.
    """

    first: int
    size: int
    cond: Condition


class BatchSampler:
    """Draws z, eps, times, step sizes and conditions of samples of the global batch.

    Args:
        noise: noise at step 0. `at` moves it to a step. Every method that draws, except `times`,
            moves it to the first sample of its call.
        shapes: of one z and one x, for each size of the run.
        prompts: conditions to draw from.
        teacher: has the schedule, the times that networks compute with, and the conditions that state a size.
        dtype: of the networks' passes.
    """

    def __init__(
        self,
        config: EMDConfig,
        noise: Noise,
        shapes: Sequence[Shape],
        prompts: Table | None,
        teacher: Denoiser,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.schedule, self.noise, self.prompts = config, teacher.schedule, noise, prompts
        self.sizes = SampleSizes(shapes, teacher, config.seed)
        self._step, self._teacher, self._dtype = 0, teacher, dtype
        self._tables: dict[tuple[tuple[float, ...], ...], Tensor] = {}

    def at(self, step: int) -> None:
        """Moves to an optimizer step."""
        self.noise.set(step=step)
        self.sizes.at(step)
        self._step = step

    def e_step(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """Draws z_0 and eps_0 of the E-step for `size` samples."""
        self.noise.set(first_sample=first)
        latent, sample = self.sizes.shape
        return (
            ops.normal((size, *latent), self.noise, stream=NoiseStream.E_STEP_Z),
            ops.normal((size, *sample), self.noise, stream=NoiseStream.E_STEP_EPS),
        )

    def fake_score(self, first: int, size: int, substep: int) -> tuple[Tensor, Tensor]:
        """Draws z and eps of one update of the fake score."""
        self.noise.set(first_sample=first)
        latent, sample = self.sizes.shape
        return (
            ops.normal((size, *latent), self.noise, stream=NoiseStream.FAKE_SCORE_Z, substep=substep),
            ops.normal((size, *sample), self.noise, stream=NoiseStream.FAKE_SCORE_EPS, substep=substep),
        )

    def rungs(self, first: int, size: int, use: int) -> Tensor:
        """Draws the rungs (size,) int64 of a few-step generator, on the CPU: the host selects samples by them.

        Args:
            use: 0 for the E-step, 1 + i for update i of the fake score.
        """
        host = Noise(self.config.seed, step=self._step, first_sample=first)
        return ops.integers(self.config.calls, (size,), host, stream=NoiseStream.RUNG, substep=use)

    def earlier_z(self, first: int, size: int, use: int, rung: int) -> Tensor:
        """Draws z of a rung before those of the samples. `use` as for `rungs`."""
        self.noise.set(first_sample=first)
        substep = use * self.config.calls + rung
        shape = (size, *self.sizes.shape.latent)
        return ops.normal(shape, self.noise, stream=NoiseStream.EARLIER_RUNG_Z, substep=substep)

    def times(self, distribution: TimeDistribution, size: int, *, stream: int, substep: int = 0) -> Tensor:
        """Draws t (size,) float32, from the sample on that the noise was moved to."""
        draw = ops.normal if distribution.kind == "log_normal" else ops.uniform
        distribution = at_size(distribution, self.sizes.index)
        log_ratio = log_ratios(distribution, draw((size,), self.noise, stream=stream, substep=substep))
        # Rounded to what the network is told before alpha and sigma are computed.
        t = self.schedule.t_from_log_snr(-2 * log_ratio).clamp(self.schedule.t_min, self.schedule.t_max)
        return self._teacher.heard(t, self._dtype)

    def step_size(self, size: StepSize, t: Tensor) -> float | Tensor:
        """Evaluates a step size at t (B,): a number as it is, pairs by interpolation to (B,).

        The interpolation is linear in log(sigma / alpha) and in the logarithm of the value.
        """
        if not isinstance(size, list):
            return size
        key = tuple(map(tuple, size))
        if key not in self._tables:  # made once: copying it to the device makes the host wait
            self._tables[key] = torch.tensor(size, dtype=torch.float32).log().to(self.noise.device)
        return _interpolate(-self.schedule.log_snr(t) / 2, self._tables[key])

    def micro_batches(self, cond: Condition, substep: int) -> list[MicroBatch]:
        """This rank's share of the global batch, split into micro-batches."""
        first, last = distributed.share(self.config.batch_size)
        size = self.config.compute.micro_batch_size or last - first
        starts = range(first, last, size)
        return [self.micro_batch(cond, substep, range(start, min(start + size, last))) for start in starts]

    def micro_batch(self, cond: Condition, substep: int, samples: range) -> MicroBatch:
        """The samples of this range of the global batch."""
        drawn = self.sizes.cond(self.conditions(cond, samples.start, samples.stop, substep))
        return MicroBatch(samples.start, len(samples), drawn)

    def shown(
        self, n: int, first_sample: int = 0, cond: Condition = None, shape: Sequence[int] | None = None
    ) -> tuple[Tensor, Condition]:
        """Draws the z (n, ...) of samples that are shown to people, and returns it with their conditions.

        Args:
            cond: their conditions, on any device; the prompts or classes in turn when None, or None without any.
            shape: of one x; that of the first size when None.
        """
        sizes = self.sizes.shown(shape)
        which = range(first_sample, first_sample + n)
        if cond is None and self.prompts is not None:
            cond = self.looked_up(torch.tensor(which, dtype=torch.int64) % len(self.prompts))
        elif cond is None and self.config.num_classes:
            cond = torch.tensor(which, dtype=torch.int64, device=self.noise.device) % self.config.num_classes
        cond = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(self.noise.device), cond)
        return self.shown_z(n, first_sample, 0, sizes.latent), self.sizes.cond(cond, sizes)

    def shown_z(self, n: int, first_sample: int, rung: int, shape: Sequence[int]) -> Tensor:
        """Draws z (n, *shape) of a rung for samples that are shown to people."""
        noise = Noise(self.config.seed, first_sample=first_sample, device=self.noise.device)
        substep = NoiseStream.shown_substep(rung)
        return ops.normal((n, *shape), noise, stream=NoiseStream.SHOWN, substep=substep)

    def conditions(self, cond: Condition, start: int, end: int, substep: int) -> Condition:
        """Conditions of the samples start .. end - 1: their rows of `cond`, or drawn when it is None."""
        self.noise.set(first_sample=start)
        if cond is not None:
            return pytree.tree_map(lambda leaf: leaf[start:end] if isinstance(leaf, Tensor) else leaf, cond)
        size = (end - start,)
        if self.prompts is not None:
            # The host looks the prompts up, so it draws too: numbers of the device would make it wait.
            host = Noise(self.config.seed, step=self._step, first_sample=start)
            drawn = ops.integers(len(self.prompts), size, host, stream=NoiseStream.CONDITION, substep=substep)
            return self.looked_up(drawn)
        if not self.config.num_classes:
            return None
        return ops.integers(self.config.num_classes, size, self.noise, stream=NoiseStream.CONDITION, substep=substep)

    def looked_up(self, indices: Tensor) -> Condition:
        """Copies the prompts at indices (n,) int64 (on the CPU) to the device."""
        assert self.prompts is not None
        found = self.prompts[indices]
        return pytree.tree_map(lambda leaf: leaf.to(self.noise.device, non_blocking=True), found)


def _interpolate(log_ratio: Tensor, points: Tensor) -> Tensor:
    """Interpolates between points (n, 2) of logarithms at log_ratio, and returns the exponential."""
    if len(points) == 1:
        return points[0, 1].exp().expand_as(log_ratio)
    x, y = points.unbind(1)
    log_ratio = log_ratio.clamp(x[0], x[-1])
    after = torch.searchsorted(x.contiguous(), log_ratio).clamp(1, len(x) - 1)
    share = (log_ratio - x[after - 1]) / (x[after] - x[after - 1])
    return torch.lerp(y[after - 1], y[after], share).exp()
