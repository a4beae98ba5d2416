"""Fréchet distance between two sets of features, or between their moments.

All arithmetic is float64. With A = R_a^T R_a and B = R_b^T R_b, the trace of (A B)^1/2 is the sum
of the singular values of R_a R_b^T. This equals the trace of the matrix square root, but it does
not take square roots of rounding errors in the small eigenvalues of A B when A or B is singular.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from emd_fast import distributed

_ROUNDING = 1e-5  # error of statistics stored in float32, relative to the largest variance


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features.

    Args:
        mean: (D,) float64, on the CPU.
        covariance: (D, D) float64, on the CPU, with the divisor n - 1.
        n: number of samples, or None if unknown.

    Raises:
        ValueError: shapes that do not match, values that are not finite, or a matrix that is no
            covariance.
    """

    mean: Tensor
    covariance: Tensor
    n: int | None = None

    def __post_init__(self) -> None:
        d = self.mean.shape[0] if self.mean.dim() == 1 else None
        if d is None or not d or self.covariance.shape != (d, d):
            raise ValueError(
                f"mean (D,) and covariance (D, D) must fit, got {tuple(self.mean.shape)} and "
                f"{tuple(self.covariance.shape)}"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise ValueError("mean and covariance must be finite: they hold NaN or infinite values")
        tolerance = _ROUNDING * self.covariance.diagonal().abs().max()
        skew = (self.covariance - self.covariance.T).abs().max()
        if skew > tolerance or (self.covariance.diagonal() < -tolerance).any():
            raise ValueError("the covariance must be symmetric, with no variance below 0")

    def factor(self) -> Tensor:
        """Returns R (D, D) with covariance = R^T R.

        Raises:
            ValueError: an eigenvalue is below 0 by more than rounding.
        """
        values, vectors = torch.linalg.eigh((self.covariance + self.covariance.T) / 2)
        if values[0] < -_ROUNDING * values[-1].abs():
            raise ValueError(f"the covariance has an eigenvalue of {values[0].item():.3g}: it is that of no set")
        return values.clamp(min=0).sqrt()[:, None] * vectors.T


class RunningMoments:
    """Accumulates the moments of features over batches and ranks, in float64."""

    def __init__(self) -> None:
        self.n = 0
        self._sum = self._products = torch.zeros(0)

    def add(self, features: Tensor) -> None:
        """Adds features (n, D) of any floating dtype."""
        features = features.double()
        if not self.n:
            self._sum = features.new_zeros(features.shape[1])
            self._products = features.new_zeros(features.shape[1], features.shape[1])
        self.n += len(features)
        self._sum += features.sum(0)
        self._products += features.T @ features

    def moments(self) -> Moments:
        """Returns the moments of the features that all ranks added.

        All ranks call it once, after each has added at least one batch.

        Raises:
            ValueError: fewer than two samples in all, or features that are not finite.
        """
        if distributed.world_size() > 1:
            count = torch.tensor(self.n)
            for total in (count, self._sum, self._products):
                dist.all_reduce(total)
            self.n = int(count)
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.n}")
        if not (self._sum.isfinite().all() and self._products.isfinite().all()):
            raise ValueError("features must be finite: those of some image are NaN or infinite")
        mean = self._sum / self.n
        covariance = (self._products - self.n * torch.outer(mean, mean)) / (self.n - 1)
        return Moments(mean.cpu(), covariance.cpu(), self.n)


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """Fréchet distance of two normal distributions, as in EDM's fid.py.

    Raises:
        ValueError: features of unequal width, or a matrix that is no covariance.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"two sets need features of one width, got {len(a.mean)} and {len(b.mean)}")
    return _distance(a.mean, a.factor(), b.mean, b.factor())


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of the normal distributions fitted to two sets of features.

    It is |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^1/2), with the covariances A and B. The factors
    of A and B come from a QR decomposition of the centred features, so that no covariance is
    rounded.

    Args:
        a, b: (n, D) features, any floating dtype, n at least 2. The arithmetic is float64.

    Returns:
        The squared distance, in squared units of the features; 0 for equal sets.

    Raises:
        ValueError: sets of unequal size or width, too few samples, or features that are not
            finite.

    Source: Heusel et al. (arXiv 1706.08500).
    """
    a, b = checked_pair(a, b)
    means = a.mean(0), b.mean(0)
    scale = 1 / math.sqrt(len(a) - 1)
    r_a, r_b = (torch.linalg.qr((x - mean) * scale, mode="r").R for x, mean in zip((a, b), means, strict=True))
    return _distance(means[0], r_a, means[1], r_b)


def _distance(mean_a: Tensor, r_a: Tensor, mean_b: Tensor, r_b: Tensor) -> float:
    overlap = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (mean_a - mean_b).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)  # rounding can take a distance of 0 below 0


def checked_pair(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Checks two sets of features (n, D) of equal size, and returns them in float64.

    Raises:
        ValueError: sets of unequal size or width, too few samples, or features that are not
            finite.
    """
    if a.dim() != 2 or a.shape != b.shape:
        raise ValueError(f"two sets of features need one shape (n, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    if len(a) < 2:
        raise ValueError(f"a set of features needs at least 2 samples, got {len(a)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features must be finite: a set holds NaN or infinite values")
    return a.detach().double(), b.detach().double()
