"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class EMA(Generic[Module]):
    """A copy of `module` whose floating weights follow it: average = d average + (1 - d) weights.

    The decay d is warmed up as min(decay, (1 + step) / (10 + step)), so that a short run is not held by its start.
    """

    def __init__(self, module: Module, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        pairs = list(zip(self._tensors(self.module), self._tensors(module), strict=True))
        torch._foreach_lerp_(
            [average for average, _ in pairs if average.is_floating_point()],
            [current for average, current in pairs if average.is_floating_point()],
            1 - decay,
        )
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)

    @staticmethod
    def _tensors(module: nn.Module) -> list[torch.Tensor]:
        return [*(p.detach() for p in module.parameters()), *module.buffers()]
