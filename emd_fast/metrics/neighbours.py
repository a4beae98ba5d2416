"""Precision and recall by k nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.metrics.distance import checked_pair

_ENTRIES = 2**25  # elements of one block of the distance matrix: 256 MiB for any number of samples
_PAIRS = 2**12  # pairs per block when distances are computed from differences
_CLOSE = 1e-11  # bound of the relative error of squared distances from a matrix product


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of generated samples in feature space.

    Precision is the fraction of generated samples inside the manifold of the real set. Recall is
    the fraction of real samples inside the manifold of the generated set. The manifold of a set is
    the union of balls around its samples, each with the distance to the k-th nearest other sample
    as radius.

    Memory does not grow with n^2. Distances come from a matrix product, which cancels for near
    samples. Distances so close to a radius that this error could decide are computed again from
    differences.

    Args:
        real, generated: (n, D) features, any floating dtype; distances are computed in float64.
        k: at least 1, below n.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        ValueError: sets of unequal size or width, k out of range, or features that are not finite.

    Source: Kynkäänniemi et al. (arXiv 1904.06991).
    """
    in_real, in_generated = Manifold(real, k).compare(generated)
    return in_real.double().mean().item(), in_generated.double().mean().item()


class Manifold:
    """The manifold of a set of real samples, to compare several generated sets with.

    Args:
        real: (n, D) features, any floating dtype; distances are computed in float64.
        k: at least 1, below n.

    Raises:
        ValueError: k out of range, too few samples, or features that are not finite.
    """

    def __init__(self, real: Tensor, k: int = 3) -> None:
        self._given = real
        real, _ = checked_pair(real, real)
        if not 1 <= k < len(real):
            raise ValueError(f"k must be at least 1 and below the {len(real)} samples, got {k}")
        self._k, self._centre = k, real.mean(0)
        self._real = real - self._centre
        self._radii = _radii(self._real, k)

    def compare(self, generated: Tensor) -> tuple[Tensor, Tensor]:
        """Says which samples lie in the manifold of the other set.

        Args:
            generated: (n, D), as many as the real samples.

        Returns:
            Bool (n,) for the generated samples, and for the real ones.

        Raises:
            ValueError: another number or width, or features that are not finite.
        """
        _, generated = checked_pair(self._given, generated)
        generated = generated - self._centre
        around_generated = _radii(generated, self._k)
        in_real = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
        in_generated = torch.zeros_like(in_real)
        for rows in torch.arange(len(generated), device=generated.device).split(_rows(len(generated))):
            distances = _squared(generated[rows], self._real)
            in_real[rows] = _within(distances, self._radii[None, :], generated[rows], self._real).any(1)
            in_generated |= _within(distances, around_generated[rows, None], generated[rows], self._real).any(0)
        return in_real, in_generated


def _rows(columns: int) -> int:
    return max(1, _ENTRIES // columns)


def _radii(samples: Tensor, k: int) -> Tensor:
    """Squared distance of each sample to its k-th nearest other sample."""
    radii = []
    for rows in samples.split(_rows(len(samples))):
        # k + 1, because the smallest distance is 0, to the sample itself.
        near = _squared(rows, samples).topk(k + 1, largest=False).indices
        exact = [_differences(rows, samples[column]) for column in near.unbind(1)]
        radii.append(torch.stack(exact, 1).amax(1))
    return torch.cat(radii)


def _within(distances: Tensor, radii: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """distances <= radii; pairs within the error bound are decided by exact differences."""
    within = distances <= radii
    error = _CLOSE * (a.square().sum(1)[:, None] + b.square().sum(1)[None, :])
    close = (distances - radii).abs_() <= error
    for at in close.nonzero().split(_PAIRS):
        i, j = at.unbind(1)
        within[i, j] = _differences(a[i], b[j]) <= radii.expand_as(distances)[i, j]
    return within


def _squared(a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b.square().sum(1)[None, :], a, b.T, alpha=-2).add_(a.square().sum(1)[:, None])


def _differences(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1)
