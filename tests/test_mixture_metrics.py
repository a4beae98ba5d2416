"""Points of a mixture whose worth is known."""

from __future__ import annotations

import math

import pytest
import torch

from emd_fast.tasks.mixture_metrics import mixture_comparison, mixture_metrics

MEANS = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
WEIGHTS = [0.4, 0.3, 0.2, 0.1]


def points(counts, std=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = MEANS.repeat_interleave(torch.tensor(counts), dim=0)
    return centres + std * torch.randn(centres.shape, generator=generator)


def test_mixture_metrics_of_exact_samples():
    metrics = mixture_metrics(points([400, 300, 200, 100]), WEIGHTS, MEANS, 0.1)
    assert metrics["mass"] == pytest.approx([0.4, 0.3, 0.2, 0.1]) and metrics["due"] == pytest.approx(WEIGHTS)
    assert metrics["modes"] == 4 and metrics["total_variation"] == pytest.approx(0)
    assert metrics["recall"] > 0.9 and metrics["precision"] > 0.9 and metrics["frechet"] < 0.05
    assert metrics["n"] == 1000


def test_mixture_metrics_of_a_collapsed_generator():
    metrics = mixture_metrics(points([1000, 0, 0, 0]), [4, 3, 2, 1], MEANS, 0.1)  # weights need not sum to 1
    assert metrics["mass"] == [1, 0, 0, 0] and metrics["modes"] == 1
    assert metrics["total_variation"] == pytest.approx(0.6)
    assert metrics["recall"] == pytest.approx(0.4, abs=0.06) and metrics["precision"] > 0.9


def test_a_mode_is_found_from_a_quarter_of_its_mass_and_not_far_from_its_mean():
    # Due 0.1 of 1000: found with 25 samples, not with 24.
    assert mixture_metrics(points([500, 300, 175, 25], std=0.01), WEIGHTS, MEANS, 0.1)["modes"] == 4
    assert mixture_metrics(points([500, 300, 176, 24], std=0.01), WEIGHTS, MEANS, 0.1)["modes"] == 3
    moved = points([400, 300, 200, 100], std=0.0)
    moved[900:, 0] += 0.29
    assert mixture_metrics(moved, WEIGHTS, MEANS, 0.1)["modes"] == 4
    moved[900:, 0] += 0.02
    far = mixture_metrics(moved, WEIGHTS, MEANS, 0.1)
    assert far["modes"] == 3 and far["mass"] == pytest.approx(WEIGHTS)


def test_mixture_comparison_adds_other_exact_samples():
    sets = {"generator": points([400, 300, 200, 100]), "init": torch.randn(1000, 2)}
    metrics = mixture_comparison(sets, WEIGHTS, MEANS, 0.1, seed=3)
    assert metrics["n"] == 1000 and metrics["seed"] == 3
    assert metrics["modes"] == {"real": 4, "generator": 4, "init": 0}
    assert metrics["recall"]["generator"] == mixture_metrics(sets["generator"], WEIGHTS, MEANS, 0.1, seed=3)["recall"]
    # The same samples on both sides would give 0 and 1.
    assert 1e-6 < metrics["frechet"]["real"] < 0.05 and 0.9 < metrics["recall"]["real"] < 1
    with pytest.raises(ValueError, match="of one size"):
        mixture_comparison({"a": torch.zeros(5, 2), "b": torch.zeros(6, 2)}, WEIGHTS, MEANS, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(10, 3), WEIGHTS, MEANS, 0.1), r"shape \(n, 2\)"),
        ((torch.zeros(3, 2), WEIGHTS, MEANS, 0.1), "n at least 4"),
        ((torch.zeros(10, 2), WEIGHTS[:3], MEANS, 0.1), "must fit"),
        ((torch.zeros(10, 2), [1, 1, 1, 0], MEANS, 0.1), "must be positive"),
        ((torch.zeros(10, 2), WEIGHTS, MEANS, 0.0), "must be positive"),
        ((torch.full((10, 2), math.nan), WEIGHTS, MEANS, 0.1), "must be finite"),
    ],
)
def test_bad_mixtures(arguments, message):
    with pytest.raises(ValueError, match=message):
        mixture_metrics(*arguments)
