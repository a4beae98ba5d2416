"""Rungs of a few-step generator in a run: their times, the rung of each sample, samples for people."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from emd_fast.config import ConfigError, EMDConfig
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.diffusion.few_step import FewStepGenerator, check_calls
from emd_fast.diffusion.generator import Generator
from emd_fast.diffusion.schedules import VP, Schedule
from emd_fast.distributed import gathers_by_block
from emd_fast.em.few_step import rollout
from emd_fast.train.batches import BatchSampler, MicroBatch

if TYPE_CHECKING:
    from emd_fast.train.trainer import EMDTrainer


def start(denoiser: Denoiser, config: EMDConfig, dtype: torch.dtype = torch.float32) -> Generator | FewStepGenerator:
    """The generator that a run starts from: a copy of the teacher, called at t_star or at the rungs.

    Args:
        denoiser: the copy.
        dtype: of its passes. A network that rounds its time is called at the rounded times.

    Raises:
        ConfigError: rungs outside the schedule, or a default spacing without room.
    """
    times = times_of(config, denoiser.schedule)
    given = torch.tensor(times, dtype=torch.float32, device="cpu")
    heard = denoiser.heard(given, dtype)
    if not torch.equal(given, heard):
        times = heard.tolist()
    denoiser = denoiser.at(times)
    if len(times) == 1:
        return Generator(denoiser, times[0], input_scale=config.input_scale)
    try:
        return FewStepGenerator(denoiser, times, config.input_scale)
    except ValueError as error:
        raise ConfigError(f"rungs = {config.rungs} do not fit this teacher: {error}") from None


def times_of(config: EMDConfig, schedule: Schedule) -> list[float]:
    """The times t_1 > ... > t_n of the rungs: those given, or n of them from t_star down.

    The default spacing is uniform in log-SNR, between t_star and the lowest noise level of
    time_distribution, which is left out. A t_star above its highest level stays the first rung, and
    the spacing begins at the highest level. Times of a chain of betas are at whole indices, which
    schedulers of diffusers know.

    Raises:
        ConfigError: t_star is below the lowest level, or two rungs have the same index.
    """
    if isinstance(config.rungs, list):
        return config.rungs
    first, n = torch.tensor([config.t_star], dtype=torch.float32, device="cpu"), config.rungs
    if n == 1:
        return [config.t_star]
    drawn = config.time_distribution
    begin = max(schedule.log_snr(first).item(), -2 * math.log(drawn.high))
    end = -2 * math.log(drawn.low)
    log_snr = torch.tensor([begin + (end - begin) * j / n for j in range(1, n)], device="cpu")
    lower = schedule.t_from_log_snr(log_snr)
    if isinstance(schedule, VP):
        lower = (lower * (schedule.indices - 1)).round() / (schedule.indices - 1)
    times = [config.t_star, *lower.tolist()]
    if any(not later < earlier for earlier, later in itertools.pairwise(times)):
        raise ConfigError(
            f"rungs = {n} have no room between t_star = {config.t_star:g} and sigma / alpha = {drawn.low:g}, the low "
            "of time_distribution: give fewer rungs, or their times"
        )
    return times


def check_given(generator: nn.Module, config: EMDConfig) -> None:
    """Checks that a generator that the caller made has the rungs of the configuration.

    Raises:
        ConfigError: it has others.
    """
    times = generator.times if isinstance(generator, FewStepGenerator) else None
    has = 1 if times is None else len(times)
    if isinstance(config.rungs, list) and times is not None:
        wanted = tuple(torch.tensor(config.rungs, dtype=torch.float32).tolist())
        if times != wanted:
            raise ConfigError(f"rungs must be the times of the generator, {list(times)}, got {config.rungs}")
    elif config.calls != has:
        what = "takes no rungs" if times is None else f"has {has} rungs"
        raise ConfigError(f"rungs must be {has}, because the generator that was given {what}: got {config.rungs}")


class Rollout:
    """Puts the samples of micro-batches on rungs: draws their rungs, and runs the earlier ones.

    Args:
        generator: as the trainer holds it.
        batches: draws rungs and noise.
    """

    def __init__(self, generator: nn.Module, batches: BatchSampler) -> None:
        self._generator, self._batches = generator, batches
        self._rungs = batches.config.calls

    def __call__(self, batch: MicroBatch, use: int) -> MicroBatch:
        """Returns the micro-batch with an OnRung as its condition; unchanged where there is one rung.

        Args:
            use: 0 for the E-step, 1 + i for update i of the fake score. Each has its own noise.
        """
        if self._rungs == 1:
            return batch
        rung = self._batches.rungs(batch.first, batch.size, use)

        def draw(i: int) -> Tensor:
            return self._batches.earlier_z(batch.first, batch.size, use, i)

        # Each pass of a network that gathers by block is a collective: no rank may leave one out.
        passes = self._rungs - 1 if gathers_by_block(self._generator) else None
        return dataclasses.replace(batch, cond=rollout(self._generator, rung, draw, batch.cond, passes))


def generated(
    generator: Callable[[Tensor, Condition], Tensor],
    batches: BatchSampler,
    z: Tensor,
    cond: Condition,
    first: int,
    calls: int | None,
) -> Tensor:
    """Samples (n, ...) for people after `calls` calls; None for one on each rung.

    Args:
        z: (n, ...) of the first rung.
        first: index of the first sample in the noise stream of shown samples.

    Raises:
        ValueError: more calls than rungs.
    """
    rungs = batches.config.calls
    calls = rungs if calls is None else check_calls(calls, rungs)
    if not isinstance(generator, FewStepGenerator):
        return generator(z, cond)
    return generator.sample([z, *(batches.shown_z(len(z), first, j, z.shape[1:]) for j in range(1, calls))], cond)[-1]


def by_calls(trainer: EMDTrainer, n: int, cond: Condition, first_sample: int = 0) -> dict[str, Tensor]:
    """Samples for an evaluation: "generator" after all calls, "generator_1" and so on after fewer."""
    calls = trainer.config.calls
    fewer = {f"generator_{k}": trainer.generate(n, cond, first_sample=first_sample, calls=k) for k in range(1, calls)}
    return {**fewer, "generator": trainer.generate(n, cond, first_sample=first_sample)}
