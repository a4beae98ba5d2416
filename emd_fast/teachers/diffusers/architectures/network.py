"""One interface for networks of diffusers: network(x, time, cond) -> output (B, C, ...)."""

from __future__ import annotations

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
