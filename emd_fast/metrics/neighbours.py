"""Precision and recall by nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.metrics.distance import pair

_ENTRIES = 2**25  # of a matrix of distances at a time: 256 MiB, however many samples there are
_PAIRS = 2**12  # distances by differences at a time
_CLOSE = 1e-11  # relative error of squared distances by products, with room to spare


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision: the share of generated samples in the manifold of the real ones. Recall: the other way round.

    The manifold of a set is the union of balls around its samples, each as far as the k-th nearest other sample.

    Args:
        real, generated: (n, D) features, any floating dtype; distances are in float64.
        k: at least 1, below n.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        ValueError: sets of unequal size or width, k out of range, or features that are not finite.

    Source: Kynkäänniemi et al. (arXiv 1904.06991). Memory does not grow with n^2. Distances are products of matrices,
    which cancel for near samples; where that could decide (a sample at the very rim of a ball, such as its copy), the
    distance is computed again by differences.
    """
    real, generated = pair(real, generated)
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
    """Squared distance of each sample to its k-th nearest other one."""
    radii = []
    for rows in samples.split(_rows(len(samples))):
        # The smallest of the k + 1 is that to itself, 0.
        near = _squared(rows, samples).topk(k + 1, largest=False).indices
        exact = [_differences(rows, samples[column]) for column in near.unbind(1)]
        radii.append(torch.stack(exact, 1).amax(1))
    return torch.cat(radii)


def _within(distances: Tensor, radii: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """distances <= radii, with those that are too close to call by differences."""
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
