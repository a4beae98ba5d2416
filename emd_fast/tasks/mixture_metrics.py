"""Metrics of points: mass per mode, and distances to exact samples of a Gaussian mixture.

Every comparison is between two sets of equal size, because all of these metrics depend on the
size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.metrics.distance import frechet
from emd_fast.metrics.neighbours import precision_recall
from emd_fast.noise import Noise, NoiseStream

# Substeps of noise stream 9 for the exact samples. Generated samples use low substeps of it.
_EXACT_MODE, _EXACT_NOISE = 60_002, 60_003


def mixture_metrics(
    samples: Tensor,
    weights: Sequence[float] | Tensor,
    means: Sequence[Sequence[float]] | Tensor,
    std: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Compares samples with a mixture of isotropic normal distributions.

    Args:
        samples: (n, D) float32, n at least 4.
        weights: (M,), positive; they are normalised to sum 1.
        means: (M, D).
        std: standard deviation of every mode in every direction; above 0.
        seed: seed of the exact samples behind "frechet", "precision" and "recall".

    Returns:
        "mass": M numbers, the fraction of samples nearest to each mean;
        "due": M numbers, the weights;
        "modes": the number of modes found. A mode is found if the fraction of samples that are
            nearest to its mean and within 3 std sqrt(D / 2) of it is at least a quarter of its
            weight. In two dimensions that radius is 3 std, which holds 98.9% of a mode;
        "total_variation": half the sum of |mass - due|;
        "frechet", "precision", "recall": against n exact samples, on the coordinates (k = 3);
        "n", "seed".

    Raises:
        ValueError: shapes that do not match, a weight or std that is not positive, or samples that
            are not finite.
    """
    weights = torch.as_tensor(weights, dtype=torch.float64)
    means = torch.as_tensor(means, dtype=torch.float64)
    if weights.dim() != 1 or means.dim() != 2 or len(means) != len(weights):
        raise ValueError(f"weights (M,) and means (M, D) must fit, got {tuple(weights.shape)} and {tuple(means.shape)}")
    if samples.dim() != 2 or samples.shape[1] != means.shape[1] or len(samples) < 4:
        raise ValueError(f"samples must have shape (n, {means.shape[1]}) with n at least 4, got {tuple(samples.shape)}")
    if not bool((weights > 0).all()) or not std > 0:
        raise ValueError(f"weights and std must be positive, got {weights.tolist()} and {std}")
    if not samples.isfinite().all():
        raise ValueError("samples must be finite: they hold NaN or infinite values")
    samples = samples.detach().cpu().double()
    weights = weights / weights.sum()

    distance, nearest = torch.cdist(samples, means, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    mass = torch.bincount(nearest, minlength=len(means)).double() / len(samples)
    close = distance <= 3 * std * math.sqrt(means.shape[1] / 2)
    close_mass = torch.bincount(nearest[close], minlength=len(means)).double() / len(samples)
    exact = _exact(weights, means, std, len(samples), seed)
    precision, recall = precision_recall(exact, samples)
    return {
        "mass": mass.tolist(),
        "due": weights.tolist(),
        "modes": int((close_mass >= weights / 4 - 1e-9).sum()),
        "total_variation": (mass - weights).abs().sum().item() / 2,
        "frechet": frechet(exact, samples),
        "precision": precision,
        "recall": recall,
        "n": len(samples),
        "seed": seed,
    }


def mixture_comparison(
    samples: Mapping[str, Tensor],
    weights: Sequence[float] | Tensor,
    means: Sequence[Sequence[float]] | Tensor,
    std: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Computes `mixture_metrics` of several sets of one size, as metric -> set name -> value.

    The set "real" is added: exact samples, drawn independently of those that all sets are compared
    with. The result also has "n" and "seed".

    Raises:
        ValueError: as for `mixture_metrics`; no set, sets of unequal size, or a set called "real".
    """
    if "real" in samples:
        raise ValueError('the set "real" is drawn from the mixture: give the generated sets another name')
    sizes = {name: len(values) for name, values in samples.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"one or more sets of one size are needed, got {sizes}")
    n = next(iter(sizes.values()))
    exact_weights = torch.as_tensor(weights, dtype=torch.float64)
    real = _exact(
        exact_weights / exact_weights.sum(), torch.as_tensor(means, dtype=torch.float64), std, n, seed, first_sample=n
    )
    found = {
        name: mixture_metrics(values, weights, means, std, seed) for name, values in {"real": real, **samples}.items()
    }
    compared = [key for key in found["real"] if key not in ("n", "seed", "due")]
    metrics: dict[str, Any] = {key: {name: result[key] for name, result in found.items()} for key in compared}
    return {**metrics, "n": n, "seed": seed}


def _exact(weights: Tensor, means: Tensor, std: float, n: int, seed: int, first_sample: int = 0) -> Tensor:
    noise = Noise(seed, first_sample=first_sample)
    drawn = ops.uniform((n,), noise, stream=NoiseStream.SHOWN, substep=_EXACT_MODE).double()
    mode = torch.searchsorted(weights.cumsum(0), drawn).clamp(max=len(weights) - 1)
    offset = ops.normal((n, means.shape[1]), noise, stream=NoiseStream.SHOWN, substep=_EXACT_NOISE).double()
    return means[mode] + std * offset
