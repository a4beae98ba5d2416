"""Exact denoisers against densities evaluated in float64."""

import math

import pytest
import torch
from helpers import assert_within, naming, seeded

from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow
from emd_fast.teachers import gaussian, gaussian_mixture

SCHEDULES = [EDM(), Cosine(), RectifiedFlow(), VP(torch.linspace(1e-4, 0.02, 1000))]
WEIGHTS = torch.tensor([0.2, 0.5, 0.3])
MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.0], [0.0, -3.0]])
FACTORS = torch.randn(3, 2, 2, generator=seeded(0))
COVARIANCES = FACTORS @ FACTORS.mT + 0.01 * torch.eye(2)


def log_density(x_t, alpha, sigma, weights, means, covariances):
    """log of the diffused mixture's density, by torch.distributions, in float64."""
    means, covariances = means.double().flatten(1), covariances.double()
    eye = torch.eye(means.shape[1], dtype=torch.float64)
    components = torch.distributions.MultivariateNormal(
        alpha[:, None, None] * means,
        alpha[:, None, None, None] ** 2 * covariances + sigma[:, None, None, None] ** 2 * eye,
    )
    mixture = torch.distributions.Categorical((weights / weights.sum()).double().expand(len(x_t), -1))
    return torch.distributions.MixtureSameFamily(mixture, components).log_prob(x_t.flatten(1))


def exact_score(x_t, t, schedule, *parts):
    x = x_t.double().requires_grad_()
    alpha, sigma = schedule.alpha(t).double(), schedule.sigma(t).double()
    return torch.autograd.grad(log_density(x, alpha, sigma, *parts).sum(), x)[0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_score_of_a_mixture(schedule, spread):
    t = schedule.t_from_log_snr(torch.linspace(-6, 10, 33)).clamp(schedule.t_min, schedule.t_max)
    x_t = spread * torch.randn(33, 2, generator=seeded(1))
    exact = exact_score(x_t, t, schedule, WEIGHTS, MEANS, COVARIANCES)
    teacher = gaussian_mixture(WEIGHTS, MEANS, COVARIANCES, schedule)
    # float64 inside; F, alpha, sigma and the product are rounded to float32.
    assert_within(teacher.score(x_t, t), exact, 1e-6 + 1e-6 * exact.abs().amax(1, keepdim=True))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_gaussian_images_and_a_singular_covariance(schedule):
    factor = torch.randn(12, 3, generator=seeded(2))  # rank 3 of 12
    mean = torch.randn(3, 2, 2, generator=seeded(3))
    teacher = gaussian(mean, factor @ factor.T, schedule)
    assert teacher.sample_shape == (3, 2, 2)
    t = schedule.t_from_log_snr(torch.tensor([4.0, 0.0, -3.0]))
    x_t = torch.randn(3, 3, 2, 2, generator=seeded(4))
    alpha, sigma = schedule.alpha(t).double(), schedule.sigma(t).double()
    for b in range(3):
        covariance = alpha[b] ** 2 * (factor @ factor.T).double() + sigma[b] ** 2 * torch.eye(12, dtype=torch.float64)
        exact = -torch.linalg.solve(covariance, x_t[b].double().flatten() - alpha[b] * mean.double().flatten())
        mine = teacher.score(x_t, t)[b].flatten()
        assert_within(mine, exact, 1e-5 * float(exact.abs().max()))


def test_far_from_every_mode_nothing_under_or_overflows():
    teacher = gaussian_mixture(WEIGHTS, MEANS, 1e-4 * torch.eye(2).expand(3, 2, 2), EDM())
    x, t = torch.tensor([[1e4, -1e4]]), torch.tensor([0.01])
    score = teacher.score(x, t)
    assert bool(torch.isfinite(score).all())
    nearest = (MEANS - x).norm(dim=1).argmin()
    assert_within(score, -(x - MEANS[nearest]) / (1e-4 + 1e-4), 1e-3 * float(score.abs().max()))


def test_dtype_follows_the_input_and_an_empty_batch_works():
    teacher = gaussian_mixture([1, 2, 3], MEANS, COVARIANCES, Cosine())
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert teacher(torch.zeros(2, 2, dtype=dtype), torch.tensor([0.3, 0.6])).dtype == dtype
    assert teacher.score(torch.empty(0, 2), torch.empty(0)).shape == (0, 2)


def test_weights_are_relative():
    x, t = torch.randn(5, 2), torch.full((5,), 0.5)
    one, two = (gaussian_mixture(scale * WEIGHTS, MEANS, COVARIANCES, EDM()).score(x, t) for scale in (1, 7))
    assert_within(one, two, 1e-6)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "named"),
    [
        (WEIGHTS[:2], MEANS, COVARIANCES, "weights"),
        (torch.tensor([0.5, 0.5, 0.0]), MEANS, COVARIANCES, "weights"),
        (torch.tensor([0.5, -0.5, 1.0]), MEANS, COVARIANCES, "weights"),
        (torch.tensor([0.5, math.nan, 1.0]), MEANS, COVARIANCES, "weights"),
        (WEIGHTS, MEANS, COVARIANCES[:2], "covariance"),
        (WEIGHTS, MEANS, COVARIANCES[:, :1], "covariance"),
        (WEIGHTS, MEANS, COVARIANCES + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "symmetric"),
        (WEIGHTS, MEANS, -COVARIANCES, "semidefinite"),
        (WEIGHTS, MEANS, COVARIANCES * math.nan, "covariances"),
        (WEIGHTS, MEANS * math.nan, COVARIANCES, "means"),
        (WEIGHTS, torch.tensor(1.0), COVARIANCES, "means"),
    ],
)
def test_parts_that_do_not_fit(weights, means, covariances, named):
    with pytest.raises(ValueError, match=naming(named)):
        gaussian_mixture(weights, means, covariances, EDM())
