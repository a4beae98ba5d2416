"""Small networks for points in the plane: the fake score and the generator where the teacher is a formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.small_unet import initialise


class TimeMLP(nn.Module):
    """network(x, c_noise, cond) for x (B, D): residual layers, the noise level by sines and cosines.

    Args:
        dimension: D. width, layers: of the hidden part. seed: of its weights (noise stream 13).
    """

    def __init__(self, dimension: int, width: int, layers: int, seed: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        # c_noise = log(sigma) / 4 spans 2.7 over EDM's range: from a part of a wave to 2 waves over that.
        self.register_buffer("frequencies", torch.linspace(0.5, 5.0, 8), persistent=False)
        self.first = nn.Linear(dimension + 16, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, dimension)
        initialise(self, seed)

    def forward(self, x: Tensor, c_noise: Tensor, cond: Condition = None) -> Tensor:
        angles = c_noise[:, None] * self.frequencies
        h = self.first(torch.cat([x, angles.cos().to(x.dtype), angles.sin().to(x.dtype)], dim=1))
        for layer in self.hidden:
            h = h + layer(silu(h))
        return self.last(silu(h))


class PointGenerator(nn.Module):
    """generator(z, cond) -> x for points (B, D).

    Args:
        dimension: D. width, layers: of the hidden part. seed: of its weights (noise stream 13).
        collapsed_at: start with every sample near this point (D,), instead of spread around the origin.
    """

    def __init__(
        self, dimension: int, width: int, layers: int, seed: int, collapsed_at: tuple[float, ...] | None = None
    ) -> None:
        super().__init__()
        self.sample_shape = (dimension,)
        self.first = nn.Linear(dimension, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.last = nn.Linear(width, dimension)
        initialise(self, seed)
        if collapsed_at is not None:
            with torch.no_grad():
                self.last.weight.mul_(0.01)
                self.last.bias.copy_(torch.tensor(collapsed_at))

    def forward(self, z: Tensor, cond: Condition = None) -> Tensor:
        h = self.first(z)
        for layer in self.hidden:
            h = h + layer(silu(h))
        return self.last(silu(h))
