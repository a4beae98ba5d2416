"""Fréchet distance, precision and recall against closed forms, EDM's formula and brute force."""

import math

import detector_files as files
import numpy as np
import pytest
import torch

from emd_fast.metrics import neighbours
from emd_fast.metrics.distance import Moments, RunningMoments, frechet, frechet_of_moments
from emd_fast.metrics.inception import InceptionScore
from emd_fast.metrics.neighbours import precision_recall


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


def test_frechet_of_equal_sets_is_zero_and_moves_with_nothing():
    x = torch.randn(50, 6)
    assert frechet(x, x) < 1e-12
    assert frechet(x, x.flip(0)) < 1e-12
    wide = torch.randn(5, 20)  # fewer samples than dimensions
    assert frechet(wide, wide) < 1e-12
    y = torch.randn(50, 6) * 0.7 + 0.3
    # float32 sums far from 0 would lose all of it.
    assert frechet(x.double() + 1e4, y.double() + 1e4) == pytest.approx(frechet(x, y), rel=1e-6)


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


def test_k_out_of_range():
    for k in (0, 8):
        with pytest.raises(ValueError, match=f"k must be at least 1 and below the 8 samples, got {k}"):
            precision_recall(torch.randn(8, 3), torch.randn(8, 3), k=k)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("entries", [2**25, 7 * 60])
def test_precision_recall_where_copies_and_rims_decide(k, entries, monkeypatch):
    monkeypatch.setattr(neighbours, "_ENTRIES", entries)
    generator = torch.Generator().manual_seed(k)
    real = torch.randn(60, 16, generator=generator, dtype=torch.float64)
    generated = torch.randn(60, 16, generator=generator, dtype=torch.float64) * 0.9
    # Two groups far apart: products of matrices know squared distances to about 1e-6 here.
    real[:, 0] += 1e5 * torch.arange(60).remainder(2)
    generated[:, 0] += 1e5 * torch.arange(60).remainder(2)
    real[:8] = real[0]  # radius 0
    generated[:4] = real[0]
    generated[4:8] = real[0] + 1e-9  # out of that ball
    generated[10:20] = real[10:20]
    distances = torch.cdist(real, real, compute_mode="donot_use_mm_for_euclid_dist")
    near = distances.sort(1)
    for i in range(30, 40):  # a step beyond the k-th neighbour, and a step before it, along the way to it
        towards = real[near.indices[i, k]] - real[i]
        generated[i] = real[i] + towards * (1 + (1e-8 if i % 3 else -1e-8))
    expected = brute(real.tolist(), generated.tolist(), k)
    assert 0.1 < min(expected) and max(expected) < 1  # or the comparison says nothing
    assert precision_recall(real, generated, k) == pytest.approx(expected, abs=1e-12)
    assert precision_recall(generated, real, k) == pytest.approx(expected[::-1], abs=1e-12)


def edm_distance(a, b):
    linalg = pytest.importorskip("scipy.linalg")
    (mu, sigma), (mu_ref, sigma_ref) = a, b
    root = linalg.sqrtm(sigma @ sigma_ref)
    return float(np.real(np.square(mu - mu_ref).sum() + np.trace(sigma + sigma_ref - 2 * root)))


def features_of_inceptions_kind(n, d, rank, seed):
    """Positive, of mean about 0.4, with variances that fall by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank, d, generator=generator) * torch.logspace(0, -4, rank)[:, None]
    return (torch.randn(n, rank, generator=generator) @ mixing * 0.3 + 0.4).relu()


@pytest.mark.parametrize(
    ("n", "d", "rank"), [(3000, 96, 96), (3000, 96, 12), (60, 128, 128)], ids=["full", "near-singular", "n below D"]
)
def test_frechet_is_that_of_edm(n, d, rank):
    a, b = features_of_inceptions_kind(n, d, rank, 0), 1.1 * features_of_inceptions_kind(n, d, rank, 1) + 0.02
    statistics = [files.statistics(x.double().numpy()) for x in (a, b)]
    found = frechet_of_moments(*(Moments(*map(torch.from_numpy, each)) for each in statistics))
    expected = edm_distance(*statistics)
    assert expected > 0.01  # or 1e-4 says nothing
    assert found == pytest.approx(expected, abs=1e-4) and frechet(a, b) == pytest.approx(expected, abs=1e-4)
    # Against what is exact, both factored ways agree closer than the matrix root does.
    assert found == pytest.approx(frechet(a, b), abs=1e-5)


def test_sums_are_the_moments_of_numpy_whatever_the_batches():
    x = features_of_inceptions_kind(200, 24, 24, 2)
    for size in (200, 64, 7):
        sums = RunningMoments()
        for batch in x.split(size):
            sums.add(batch)
        found = sums.moments()
        assert found.n == 200 and found.mean.dtype == found.covariance.dtype == torch.float64
        np.testing.assert_allclose(found.mean, x.numpy().astype(np.float64).mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(x.numpy().astype(np.float64).T), rtol=1e-9, atol=1e-13)


EYE, ZERO = torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("mean", "covariance", "said"),
    [
        (ZERO[:2], EYE, "must fit"),
        (ZERO[None], EYE, "must fit"),
        (ZERO, EYE * math.nan, "must be finite"),
        (ZERO, EYE + torch.ones(3, 3).double().triu(1), "must be symmetric"),
        (ZERO, -EYE, "no variance below 0"),
    ],
)
def test_moments_that_are_none(mean, covariance, said):
    with pytest.raises(ValueError, match=said):
        Moments(mean, covariance)


def test_moments_that_have_no_distance():
    indefinite, sums = Moments(ZERO, EYE + 2 * (1 - EYE)), RunningMoments()
    with pytest.raises(ValueError, match="an eigenvalue of -1"):
        frechet_of_moments(indefinite, indefinite)
    with pytest.raises(ValueError, match="one width, got 3 and 2"):
        frechet_of_moments(Moments(ZERO, EYE), Moments(ZERO[:2], EYE[:2, :2]))
    one, infinite = torch.ones(1, 3), torch.full((2, 3), math.inf)
    for more, said in ((one, "at least 2 samples, got 1"), (infinite, "features must be finite")):
        sums.add(more)
        with pytest.raises(ValueError, match=said):
            sums.moments()


@pytest.mark.parametrize(("n", "batch"), [(100, 100), (103, 16)])
def test_inception_score_is_that_of_its_formula(n, batch):
    logits = torch.randn(n, 12, generator=torch.Generator().manual_seed(0)) * 3
    probabilities = logits.softmax(1)
    scores = []
    for i in range(10):
        p = probabilities.double().numpy()[i * n // 10 : (i + 1) * n // 10]
        scores.append(np.exp((p * (np.log(p) - np.log(p.mean(0, keepdims=True)))).sum(1).mean()))
    score = InceptionScore(n)
    for first in range(0, n, batch):
        score.add(probabilities[first : first + batch], first)
    assert score.value() == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)
    assert np.mean(scores) > 1.5


def test_inception_score_of_sure_and_of_no_classes():
    for probabilities, expected in ((torch.eye(4).repeat(10, 1), 4.0), (torch.full((40, 4), 0.25), 1.0)):
        score = InceptionScore(40)
        score.add(probabilities, 0)
        assert score.value() == pytest.approx((expected, 0.0))
    with pytest.raises(ValueError, match="at least 10 samples, one in each part, got 9"):
        InceptionScore(9)
