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
    real, generated = checked_pair(real, generated)
    if not 1 <= k < len(real):
        raise ValueError(f"k must be at least 1 and below the {len(real)} samples, got {k}")
    centre = real.mean(0)
    real, generated = real - centre, generated - centre
    around_real, around_generated = _radii(real, k), _radii(generated, k)

    in_real = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    in_generated = torch.zeros_like(in_real)
    for rows in torch.arange(len(generated), device=real.device).split(_rows(len(real))):
        distances = _squared(generated[rows], real)
        in_real[rows] = _within(distances, around_real[None, :], generated[rows], real).any(1)
        in_generated |= _within(distances, around_generated[rows, None], generated[rows], real).any(0)
    return in_real.double().mean().item(), in_generated.double().mean().item()


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
