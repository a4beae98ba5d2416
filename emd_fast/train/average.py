"""Exponential moving average of a network's weights, with a decay that depends on the step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from emd_fast.config import AverageConfig
from emd_fast.distributed import local

Module = TypeVar("Module", bound=nn.Module)
Profile = Callable[[int], float]  # from the step (0, 1, 2, ...) to the decay


def constant(decay: float) -> Profile:
    """min(decay, (1 + step) / (10 + step)).

    The warm-up keeps the initial weights from dominating a short run.
    """
    return lambda step: min(decay, (1 + step) / (10 + step))


def power(gamma: float) -> Profile:
    """(1 - 1 / t)^(gamma + 1) at t = step + 1.

    The contribution of past weights falls as a power of time. The average therefore spans the same
    fraction of a run of any length, and starts as the weights themselves.

    Source: Karras et al., arXiv 2312.02696, section 3.
    """
    return lambda step: (1 - 1 / (step + 1)) ** (gamma + 1)


def half_life(samples: float, batch_size: int) -> Profile:
    """0.5^(batch_size / half-life), with a half-life of `samples` training samples.

    Early in a run the half-life is a twentieth of the samples so far, where that is less.

    Source: Karras et al., arXiv 2206.00364.
    """
    return lambda step: 0.5 ** (batch_size / min(samples, 0.05 * batch_size * (step + 1)))


def profile(config: AverageConfig, batch_size: int) -> Profile:
    """The decay profile that the configuration selects."""
    if config.ema_profile == "power":
        return power(config.ema_power)
    if config.ema_profile == "half_life":
        return half_life(config.ema_half_life, batch_size)
    return constant(config.ema)


class EMA(Generic[Module]):
    """A copy of `module` that holds its average: average = d average + (1 - d) weights.

    Integer buffers are copied. If both modules are sharded, they must be sharded alike, and each
    rank averages its own shards.

    Args:
        decay: a profile, or the number for `constant`.
        shared: tensors by id that do not change, and that the copy shares with `module`.
    """

    def __init__(self, module: Module, decay: Profile | float, shared: Mapping[int, Tensor] | None = None) -> None:
        self.decay = constant(decay) if isinstance(decay, float) else decay
        self.module = copy.deepcopy(module, dict(shared or {})).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = self.decay(step)
        both = zip(self._tensors(self.module), self._tensors(module), strict=True)
        pairs = [
            (local(average.detach()), local(current.detach())) for average, current in both if average is not current
        ]
        torch._foreach_lerp_(
            [average for average, _ in pairs if average.is_floating_point()],
            [current for average, current in pairs if average.is_floating_point()],
            1 - decay,
        )
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)

    @staticmethod
    def _tensors(module: nn.Module) -> list[Tensor]:
        return [*module.parameters(), *module.buffers()]
