"""Teachers with an exact score, for tests of the algorithm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.diffusion.schedules import Schedule


def gaussian(mean: Tensor, covariance: Tensor, schedule: Schedule) -> Denoiser:
    """Returns the exact denoiser of the normal distribution N(mean, covariance).

    Args:
        mean: tensor with the shape of one sample, d elements.
        covariance: (d, d), symmetric, positive semidefinite.
        schedule: any schedule.

    Raises:
        ValueError: shapes that do not match, or a matrix that is no covariance.
    """
    mean = torch.as_tensor(mean)
    return gaussian_mixture([1.0], mean[None], torch.as_tensor(covariance)[None], schedule)


def gaussian_mixture(
    weights: Tensor | Sequence[float], means: Tensor, covariances: Tensor, schedule: Schedule
) -> Denoiser:
    """Returns the exact denoiser of the mixture sum_m weights[m] N(means[m], covariances[m]).

    Args:
        weights: (M,), positive. They are scaled to a sum of 1.
        means: (M, ...), with d elements per mean in the shape of one sample.
        covariances: (M, d, d), symmetric, positive semidefinite.
        schedule: any schedule.

    Raises:
        ValueError: shapes that do not match, weights that are not positive, or a matrix that is no
            covariance.
    """
    network = _MixtureNoise(torch.as_tensor(weights), torch.as_tensor(means), torch.as_tensor(covariances), schedule)
    # In the "eps" form the score is -F / sigma, which subtracts nothing.
    return Denoiser(network, schedule, "eps", sample_shape=tuple(torch.as_tensor(means).shape[1:]))


class _MixtureNoise(nn.Module):
    """Returns E[eps | x_t], computed in float64 for inputs of any floating dtype."""

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.log_weights: Tensor
        self.means: Tensor
        self.eigenvalues: Tensor
        self.vectors: Tensor
        if means.dim() < 1 or weights.shape != means.shape[:1]:
            raise ValueError(f"weights {tuple(weights.shape)} and means {tuple(means.shape)} must agree on components")
        weights, flat, covariances = weights.double(), means.double().reshape(len(means), -1), covariances.double()
        components, dimension = flat.shape
        if tuple(covariances.shape) != (components, dimension, dimension):
            wanted = (components, dimension, dimension)
            raise ValueError(f"covariance must have shape {wanted} over components, got {tuple(covariances.shape)}")
        for name, value in (("means", flat), ("covariances", covariances)):
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite")
        if not bool(((weights > 0) & (weights < torch.inf)).all()):
            raise ValueError("weights must be positive and finite")
        if not torch.allclose(covariances, covariances.mT, rtol=1e-5, atol=1e-8):
            raise ValueError("covariance must be symmetric")
        eigenvalues, vectors = torch.linalg.eigh(covariances)
        if eigenvalues.min() < -1e-6 * eigenvalues.abs().max():
            raise ValueError(f"covariance must be positive semidefinite, its least eigenvalue is {eigenvalues.min():g}")
        self.schedule = schedule
        self.register_buffer("log_weights", torch.log(weights / weights.sum()))
        self.register_buffer("means", flat)
        self.register_buffer("eigenvalues", eigenvalues.clamp(min=0))
        self.register_buffer("vectors", vectors)

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        alpha, sigma = self.schedule.alpha(t).double(), self.schedule.sigma(t).double()
        centred = x_t.reshape(len(x_t), 1, self.means.shape[1]).double() - alpha[:, None, None] * self.means
        along = torch.einsum("bmd,mde->bme", centred, self.vectors)
        variance = alpha[:, None, None] ** 2 * self.eigenvalues + sigma[:, None, None] ** 2
        log_density = -0.5 * (along**2 / variance + torch.log(variance)).sum(2)
        responsibility = torch.softmax(self.log_weights + log_density, dim=1)
        pull = torch.einsum("bme,mde->bmd", along / variance, self.vectors)
        eps = sigma[:, None] * torch.einsum("bm,bmd->bd", responsibility, pull)
        return eps.reshape(x_t.shape).to(x_t.dtype)
