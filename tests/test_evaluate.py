"""Metrics against closed forms and brute force."""

import math

import numpy as np
import pytest
import torch

from emd_fast import evaluate
from emd_fast.evaluate import (
    DigitFeatures,
    digits_metrics,
    frechet,
    mixture_comparison,
    mixture_metrics,
    precision_recall,
)
from emd_fast.teachers import digits

# Fréchet distance -------------------------------------------------------------------------------------------------


def with_moments(n, mean, covariance, seed):
    """(n, D) float64 whose sample mean and covariance (n - 1) are exactly these."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, len(mean), generator=generator, dtype=torch.float64)
    white = torch.linalg.qr(x - x.mean(0)).Q * math.sqrt(n - 1)
    values, vectors = torch.linalg.eigh(covariance)
    return white @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T + mean


def random_covariance(d, seed, rank=None):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(d, rank or d + 2, generator=generator, dtype=torch.float64)
    return factor @ factor.T / d


@pytest.mark.parametrize("rank", [None, 2], ids=["full rank", "singular"])
def test_frechet_of_known_moments(rank):
    a_cov, b_cov = random_covariance(5, 0), random_covariance(5, 1, rank)
    mean = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    a, b = with_moments(40, torch.zeros_like(mean), a_cov, 2), with_moments(40, mean, b_cov, 3)
    # tr (A B)^1/2 from the eigenvalues of the product, which is not symmetric.
    root = np.sqrt(np.linalg.eigvals((a_cov @ b_cov).numpy()).astype(complex)).real.sum()
    expected = (mean @ mean + a_cov.trace() + b_cov.trace()).item() - 2 * root
    assert frechet(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-6)


def test_frechet_in_one_dimension_and_for_commuting_covariances():
    one = torch.eye(1, dtype=torch.float64)
    a = with_moments(30, torch.tensor([1.0], dtype=torch.float64), 4 * one, 0)
    b = with_moments(30, torch.tensor([-2.0], dtype=torch.float64), 0.25 * one, 1)
    assert frechet(a, b) == pytest.approx(3**2 + (2 - 0.5) ** 2, rel=1e-10)
    stds = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 0.0]], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    sets = [with_moments(30, zero, torch.diag(s**2), i) for i, s in enumerate(stds)]
    assert frechet(*sets) == pytest.approx(1 + 0 + 9, rel=1e-10)


def test_frechet_of_equal_sets_is_zero_and_moves_with_nothing():
    x = torch.randn(50, 6)
    assert frechet(x, x) < 1e-12
    assert frechet(x, x.flip(0)) < 1e-12
    wide = torch.randn(5, 20)  # fewer samples than dimensions
    assert frechet(wide, wide) < 1e-12
    y = torch.randn(50, 6) * 0.7 + 0.3
    # float32 sums far from 0 would lose all of it.
    assert frechet(x.double() + 1e4, y.double() + 1e4) == pytest.approx(frechet(x, y), rel=1e-6)


# Precision and recall ---------------------------------------------------------------------------------------------


def brute(real, generated, k):
    def share(samples, manifold):
        inside = 0
        for sample in samples:
            for i, centre in enumerate(manifold):
                others = sorted(math.dist(centre, other) for j, other in enumerate(manifold) if j != i)
                if math.dist(sample, centre) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(samples)

    return share(generated, real), share(real, generated)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1024, 7])
def test_precision_recall_against_brute_force(k, chunk, monkeypatch):
    monkeypatch.setattr(evaluate, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    generated = 0.8 * torch.randn(40, 3, generator=generator, dtype=torch.float64) + 0.9
    expected = brute(real.tolist(), generated.tolist(), k)
    assert precision_recall(real, generated, k) == pytest.approx(expected, abs=1e-12)
    assert 0.1 < min(expected) and max(expected) < 1  # or the comparison says nothing
    # Far from the origin the usual a^2 + b^2 - 2ab would lose these distances.
    assert precision_recall(real + 1e8, generated + 1e8, k) == pytest.approx(expected, abs=1e-12)


def test_precision_and_recall_are_not_the_same():
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [100.0], [101.0], [102.0], [103.0]])
    half = torch.tensor([[0.1], [1.1], [2.1], [2.9], [0.3], [0.6], [1.6], [2.3]])
    assert precision_recall(real, half, k=1) == (1.0, 0.5)
    assert precision_recall(half, real, k=1) == (0.5, 1.0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)


@pytest.mark.parametrize("metric", [frechet, precision_recall])
def test_bad_features(metric):
    x = torch.randn(8, 3)
    with pytest.raises(ValueError, match=r"one shape \(n, D\), got \(8, 3\) and \(7, 3\)"):
        metric(x, x[:7])
    with pytest.raises(ValueError, match="one shape"):
        metric(x[:, 0], x[:, 0])
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        metric(x[:1], x[:1])
    for value in (math.nan, math.inf):
        bad = x.clone()
        bad[3, 1] = value
        for pair in ((bad, x), (x, bad)):
            with pytest.raises(ValueError, match="finite"):
                metric(*pair)


@pytest.mark.parametrize("k", [0, 8])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"k must be at least 1 and below the 8 samples, got {k}"):
        precision_recall(torch.randn(8, 3), torch.randn(8, 3), k=k)


# Digits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def features():
    return DigitFeatures()


def test_the_classifier_knows_digits_it_has_not_seen(features):
    images, labels = digits.load("test")
    assert (features.predict(images) == labels).float().mean() >= 0.98
    found = features.features(images)
    assert found.shape == (599, 64) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(features._network.last(found).argmax(1), features.predict(images))
    assert features.features(images[:0]).shape == (0, 64)
    with pytest.raises(ValueError, match=r"\(N, 1, 8, 8\), got \(3, 1, 28, 28\)"):
        features.features(torch.zeros(3, 1, 28, 28))


def test_the_classifier_depends_on_its_seed_alone():
    images, _ = digits.load("test")
    torch.manual_seed(0)
    one = DigitFeatures(3, steps=5).features(images)
    torch.manual_seed(1)
    assert torch.equal(DigitFeatures(3, steps=5).features(images), one)
    assert not torch.equal(DigitFeatures(4, steps=5).features(images), one)


def test_metrics_of_sets_that_are_known(features):
    images, labels = digits.load("test")
    generator = torch.Generator().manual_seed(0)
    # One clean image of each class, with a little noise: what a collapsed generator makes.
    first = torch.stack([images[labels == digit][0] for digit in range(10)])[labels]
    sets = {
        "test": (images, labels),
        "wrong": (images, (labels + 1) % 10),
        "collapsed": (first + 0.01 * torch.randn(first.shape, generator=generator), labels),
        "noise": (torch.randn(images.shape, generator=generator).clamp(-1, 1), labels),
        "asked for nothing": (images, None),
    }
    metrics = digits_metrics(sets, features)
    assert metrics["n"] == 599 and metrics["seed"] == 0
    distance = metrics["frechet"]
    assert list(distance) == ["real", *sets]
    assert distance["test"] < 1e-9 < distance["real"] < distance["collapsed"] / 3 < distance["noise"]
    assert metrics["recall"]["test"] == metrics["precision"]["test"] == 1
    assert metrics["recall"]["real"] > 0.8 and metrics["precision"]["real"] > 0.8
    assert metrics["recall"]["collapsed"] < 0.1 and metrics["precision"]["collapsed"] > 0.9
    assert metrics["accuracy"]["test"] >= 0.98 and metrics["accuracy"]["wrong"] <= 0.02
    assert metrics["accuracy"]["noise"] < 0.3 and metrics["accuracy"]["real"] > 0.98
    assert "asked for nothing" not in metrics["accuracy"]


def test_fewer_images_and_another_seed(features):
    images, labels = digits.load("test")
    one = digits_metrics({"a": (images[:100], labels[:100])}, features, seed=1)
    assert one["n"] == 100
    assert one == digits_metrics({"a": (images[:100], labels[:100])}, features, seed=1)
    assert (
        one["frechet"]["real"]
        != digits_metrics({"a": (images[:100], labels[:100])}, features, seed=2)["frechet"]["real"]
    )


def test_bad_sets(features):
    images, labels = digits.load("test")
    with pytest.raises(ValueError, match=r"every set needs 599 images.*'b' has 598 images"):
        digits_metrics({"a": (images, labels), "b": (images[1:], labels[1:])}, features)
    with pytest.raises(ValueError, match=r"'a' has 599 images and labels \(598,\)"):
        digits_metrics({"a": (images, labels[1:])}, features)
    with pytest.raises(ValueError, match="another name"):
        digits_metrics({"real": (images, labels)}, features)
    with pytest.raises(ValueError, match=r"4 to 599 images.*got 600"):
        digits_metrics({"a": (torch.cat([images, images[:1]]), torch.cat([labels, labels[:1]]))}, features)
    with pytest.raises(ValueError, match="finite: 'a'"):
        digits_metrics({"a": (images / 0, labels)}, features)


# Mixtures ---------------------------------------------------------------------------------------------------------

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
    sets = {"student": points([400, 300, 200, 100]), "init": torch.randn(1000, 2)}
    metrics = mixture_comparison(sets, WEIGHTS, MEANS, 0.1, seed=3)
    assert metrics["n"] == 1000 and metrics["seed"] == 3
    assert metrics["modes"] == {"real": 4, "student": 4, "init": 0}
    assert metrics["recall"]["student"] == mixture_metrics(sets["student"], WEIGHTS, MEANS, 0.1, seed=3)["recall"]
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
