"""One interface for networks of diffusers: network(x, time, cond) -> output (B, C, ...)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import told
from emd_fast.teachers.diffusers.architectures.form import Architecture


class Network(nn.Module):
    """Adapter with the interface that Denoiser expects of a network.

    `forward` takes x (B, C, H, W) or (B, C, F, H, W), the training index (B,) floating, and a
    condition. It returns the shape of x, or twice the channels with a learned variance.

    Args:
        model: a model of diffusers.
        architecture: how it is called.

    Raises:
        ValueError, TypeError: the model does not take this condition.
    """

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        super().__init__()
        self.model, self.architecture = model, architecture
        self.takes = architecture.takes

    def forward(self, x: Tensor, index: Tensor, cond: Condition = None) -> Tensor:
        return self.architecture.call(self.model, x, index, self.arguments(cond, len(x)))

    def arguments(self, cond: Condition, batch: int) -> dict[str, Tensor]:
        """The tensors of a condition by name.

        Raises:
            ValueError, TypeError: the model does not take this condition.
        """
        given = self.takes.arguments(cond, batch)
        if given is None:
            raise ValueError(
                f"this {type(self.model).__name__} takes {self.takes}; for a batch of {batch} got {told(cond)}"
            )
        return given

    def sized(self, cond: Condition, shape: Sequence[int], vae: Mapping[str, Any]) -> Condition:
        """Returns a condition (B, ...) with the tensors that state the size of a sample set to that of `shape`.

        Args:
            vae: configuration of the VAE; empty without one.
        """
        if not isinstance(cond, Mapping):
            return cond
        stated = self.architecture.of_size(shape, vae)
        fits = {name: row for name, row in stated.items() if name in cond and cond[name].dim() == 2}
        return {**cond, **{name: _filled(cond[name], row) for name, row in fits.items()}}


def _filled(like: Tensor, row: Sequence[float]) -> Tensor:
    """(B, n) of one row. A tensor made from a list would be copied to the device, and the host would wait."""
    return torch.stack([torch.full_like(like[:, 0], number) for number in row], 1)
