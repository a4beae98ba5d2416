"""What the samples of a step are drawn from: every number from the stream that is its own (docs/algorithm.md)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emd_fast import ops
from emd_fast.config import EMDConfig, StepSize, TimeDistribution
from emd_fast.diffusion.denoiser import Condition
from emd_fast.diffusion.schedules import Schedule
from emd_fast.noise import Noise, NoiseStream
from emd_fast.train.conditions import Table


class BatchSampler:
    """z, eps, times, step sizes and conditions of some samples of the global batch.

    Args:
        noise: of step 0, moved by what is called here: to a step by `at`, to the first sample by what draws, but for
            `times`, which comes after.
        latent_shape, sample_shape: of one z, of one x.
        prompts: conditions to draw from.
    """

    def __init__(
        self,
        config: EMDConfig,
        schedule: Schedule,
        noise: Noise,
        *,
        latent_shape: tuple[int, ...],
        sample_shape: tuple[int, ...],
        prompts: Table | None,
    ) -> None:
        self.config, self.schedule, self.noise = config, schedule, noise
        self.latent_shape, self.sample_shape, self.prompts = latent_shape, sample_shape, prompts
        self._step = 0
        self._tables: dict[tuple[tuple[float, ...], ...], Tensor] = {}

    def at(self, step: int) -> None:
        """Moves to an optimizer step."""
        self.noise.set(step=step)
        self._step = step

    def e_step(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """z_0 and eps_0 of the E-step, of so many samples."""
        self.noise.set(first_sample=first)
        return (
            ops.normal((size, *self.latent_shape), self.noise, stream=NoiseStream.E_STEP_Z),
            ops.normal((size, *self.sample_shape), self.noise, stream=NoiseStream.E_STEP_EPS),
        )

    def fake_score(self, first: int, size: int, substep: int) -> tuple[Tensor, Tensor]:
        """z and eps of an update of the fake score."""
        self.noise.set(first_sample=first)
        return (
            ops.normal((size, *self.latent_shape), self.noise, stream=NoiseStream.FAKE_SCORE_Z, substep=substep),
            ops.normal((size, *self.sample_shape), self.noise, stream=NoiseStream.FAKE_SCORE_EPS, substep=substep),
        )

    def times(self, distribution: TimeDistribution, size: int, *, stream: int, substep: int = 0) -> Tensor:
        """t (size,) float32 of the samples that the noise stands at."""
        low, high = math.log(distribution.low), math.log(distribution.high)
        if distribution.kind == "log_uniform":
            log_ratio = low + (high - low) * ops.uniform((size,), self.noise, stream=stream, substep=substep)
        else:
            normal = ops.normal((size,), self.noise, stream=stream, substep=substep)
            log_ratio = (distribution.mean + distribution.std * normal).clamp(low, high)
        return self.schedule.t_from_log_snr(-2 * log_ratio).clamp(self.schedule.t_min, self.schedule.t_max)

    def step_size(self, size: StepSize, t: Tensor) -> float | Tensor:
        """The number, or (B,) interpolated in log (sigma / alpha) and log value."""
        if not isinstance(size, list):
            return size
        key = tuple(map(tuple, size))
        if key not in self._tables:  # made once: copying it to the device makes the host wait
            self._tables[key] = torch.tensor(size, dtype=torch.float32).log().to(self.noise.device)
        return _interpolate(-self.schedule.log_snr(t) / 2, self._tables[key])

    def conditions(self, cond: Condition, start: int, end: int, substep: int) -> Condition:
        """Of the samples from `start` to before `end`: their part of `cond`, or drawn where that is None."""
        self.noise.set(first_sample=start)
        if cond is not None:
            return pytree.tree_map(lambda leaf: leaf[start:end] if isinstance(leaf, Tensor) else leaf, cond)
        size = (end - start,)
        if self.prompts is not None:
            # Drawn on the host, which has to look the prompts up, and would wait for the device otherwise.
            host = Noise(self.config.seed, step=self._step, first_sample=start)
            drawn = ops.integers(len(self.prompts), size, host, stream=NoiseStream.CONDITION, substep=substep)
            return self.looked_up(drawn)
        if not self.config.num_classes:
            return None
        return ops.integers(self.config.num_classes, size, self.noise, stream=NoiseStream.CONDITION, substep=substep)

    def looked_up(self, indices: Tensor) -> Condition:
        """The prompts at indices (n,) int64 on the CPU, on the device."""
        assert self.prompts is not None
        found = self.prompts[indices]
        return pytree.tree_map(lambda leaf: leaf.to(self.noise.device, non_blocking=True), found)


def _interpolate(log_ratio: Tensor, points: Tensor) -> Tensor:
    """exp of what lies at log_ratio between points (n, 2) of logarithms."""
    if len(points) == 1:
        return points[0, 1].exp().expand_as(log_ratio)
    x, y = points.unbind(1)
    log_ratio = log_ratio.clamp(x[0], x[-1])
    after = torch.searchsorted(x.contiguous(), log_ratio).clamp(1, len(x) - 1)
    share = (log_ratio - x[after - 1]) / (x[after] - x[after - 1])
    return torch.lerp(y[after - 1], y[after], share).exp()
