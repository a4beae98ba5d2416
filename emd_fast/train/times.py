"""Random times of a training step, by their noise-to-signal ratio sigma / alpha."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from emd_fast.config import ConfigError, EMDConfig, TimeDistribution
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.schedules import RectifiedFlow

_RHO = 7.0  # Karras et al., arXiv 2206.00364


def log_ratios(distribution: TimeDistribution, drawn: Tensor) -> Tensor:
    """Computes log (sigma / alpha) of random numbers.

    Args:
        distribution: with one shift, if it is of shifted times.
        drawn: (B,) float32, normal for log_normal and uniform in (0, 1) for the other kinds.
    """
    low, high = math.log(distribution.low), math.log(distribution.high)
    if distribution.kind == "log_normal":
        return (distribution.mean + distribution.std * drawn).clamp(low, high)
    if distribution.kind == "karras":
        first, last = math.exp(low / _RHO), math.exp(high / _RHO)
        return _RHO * torch.log(first + (last - first) * drawn)
    if distribution.kind == "shifted":
        # s t / (1 + (s - 1) t) multiplies the ratio t / (1 - t) by s. The bounds cut the distribution.
        assert isinstance(distribution.shift, float)  # with_shift, at_size
        first, last = (ratio / (distribution.shift + ratio) for ratio in (distribution.low, distribution.high))
        return math.log(distribution.shift) + torch.logit(first + (last - first) * drawn)
    return low + (high - low) * drawn


def at_size(distribution: TimeDistribution, size: int) -> TimeDistribution:
    """The distribution for samples of one of several sizes, which may have a shift of its own."""
    if not isinstance(distribution.shift, list):
        return distribution
    return dataclasses.replace(distribution, shift=distribution.shift[size])


def with_shift(config: EMDConfig, teacher: Denoiser) -> EMDConfig:
    """Fills the shift of shifted times in from the teacher's scheduler, where none is given.

    A checkpoint then holds it, so that a run does not go on with another one. It is a list where the
    sizes of a run have several.

    Raises:
        ConfigError: shifted times of a teacher that is no rectified flow, or whose shift is not known; another
            number of shifts than of sizes.
    """
    return dataclasses.replace(
        config,
        time_distribution=_filled("time_distribution", config.time_distribution, teacher),
        fake_score_time_distribution=_filled(
            "fake_score_time_distribution", config.fake_score_time_distribution, teacher
        ),
    )


def _filled(name: str, times: TimeDistribution, teacher: Denoiser) -> TimeDistribution:
    if times.kind != "shifted":
        return times
    if not isinstance(teacher.schedule, RectifiedFlow):
        raise ConfigError(
            f'{name} of kind "shifted" needs a rectified flow, got a teacher of {teacher.schedule!r}: give another kind'
        )
    if isinstance(times.shift, list) and len(times.shift) != len(teacher.sample_shapes):
        raise ConfigError(
            f"{name} must have one shift, or one for each of {len(teacher.sample_shapes)} sizes, got {times.shift}"
        )
    if times.shift is not None:
        return times
    shifts = [teacher.shift_of(shape) for shape in teacher.sample_shapes] or [teacher.shift]
    known = [shift for shift in shifts if shift is not None]
    if len(known) < len(shifts):
        raise ConfigError(
            f'{name} of kind "shifted" needs a shift, and the teacher has no scheduler that says one: give it'
        )
    return dataclasses.replace(times, shift=known if len(set(known)) > 1 else known[0])
