"""Small networks for points: fake score and generator for analytic teachers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.small_unet import initialise


class TimeMLP(nn.Module):
    """Residual MLP network(x, c_noise, cond) for x (B, D), with a Fourier embedding of c_noise (B,).

    Args:
        dimension: D, the number of coordinates.
        width, layers: width and number of the hidden layers.
        seed: seed of the weights (noise stream 13).
    """

    def __init__(self, dimension: int, width: int, layers: int, seed: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        # c_noise = log(sigma) / 4 has a range of 2.7 for EDM. The frequencies give from a fraction
        # of a period to 2 periods over it.
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
    """Generator MLP for points: generator(z, cond) -> x, each (B, D).

    Args:
        dimension: D, the number of coordinates.
        width, layers: width and number of the hidden layers.
        seed: seed of the weights (noise stream 13).
        collapsed_at: a point (D,). The generator starts with every sample near it, instead of
            samples around the origin.
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
