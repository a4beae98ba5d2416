"""The Heun sampler against the exact solution of the probability-flow ODE of a normal distribution."""

import itertools
import math

import pytest
import torch

from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.sampler import heun
from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow
from emd_fast.teachers import gaussian

MEAN = torch.tensor([0.5, -0.3, 0.1])
STDS = torch.tensor([1.2, 0.6, 0.3], dtype=torch.float64)
AXES = torch.linalg.qr(torch.tensor([[1.0, 2.0, 0.5], [-1.0, 0.3, 2.0], [0.2, 1.0, -1.0]], dtype=torch.float64)).Q
COVARIANCE = AXES @ torch.diag(STDS**2) @ AXES.T
SCHEDULES = [EDM(), Cosine(), RectifiedFlow(), VP(torch.linspace(1e-4, 0.02, 1000))]
Z = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-1.5, 0.7, 2.0]])


def exact(z, highest):
    """Along an axis of variance s^2 the ODE scales y - mean by s / sqrt(s^2 + r^2) on its way from r to 0."""
    start = highest * z.double() - MEAN.double()
    return MEAN.double() + (start @ AXES * STDS / torch.sqrt(STDS**2 + highest**2)) @ AXES.T


def highest_ratio(schedule):
    log_snr = schedule.log_snr(torch.tensor([schedule.t_max]))
    return min(80.0, math.exp(-log_snr.item() / 2))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_second_order_towards_the_exact_solution(schedule):
    teacher = gaussian(MEAN, COVARIANCE, schedule)
    truth = exact(Z, highest_ratio(schedule))
    errors = [(heun(teacher, Z, steps=steps).double() - truth).abs().max().item() for steps in (18, 36, 72)]
    assert errors[0] < 0.06
    for coarse, fine in itertools.pairwise(errors):
        assert 3.0 < coarse / fine < 6.0, errors  # 4 for order 2, 2 for order 1, 8 for order 3


def counting(dims=1):
    calls = []

    def denoised(x_t, t, cond):
        calls.append((t, cond))
        return torch.zeros_like(x_t) if cond is None else cond.reshape(-1, *[1] * dims).float().expand_as(x_t)

    return Denoiser.from_x0(denoised, EDM(), null_cond=7), calls


def test_evaluations_times_and_no_graph():
    denoiser, calls = counting()
    sampled = heun(denoiser, torch.randn(2, 3, requires_grad=True), steps=5)
    assert len(calls) == 2 * 5 - 1 and not sampled.requires_grad
    times = torch.stack([t[0] for t, _ in calls])
    assert times[0].item() == pytest.approx(80.0, rel=1e-5) and times[-1].item() == pytest.approx(0.002, rel=1e-4)
    assert torch.equal(times, times.sort(descending=True).values)


def test_the_last_step_gives_the_denoised_image_and_the_condition_reaches_it():
    denoiser, _ = counting()
    labels = torch.tensor([2, 5])
    torch.testing.assert_close(heun(denoiser, torch.randn(2, 3), labels), labels[:, None].float().expand(2, 3))
    # Guidance: 7 is the null condition, so D = 7 + w (label - 7).
    guided = heun(denoiser, torch.randn(2, 3), labels, guidance=2.0)
    torch.testing.assert_close(guided, (7 + 2 * (labels[:, None].float() - 7)).expand(2, 3))


def test_bad_input():
    denoiser, _ = counting()
    with pytest.raises(ValueError, match="steps must be at least 2, got 1"):
        heun(denoiser, torch.zeros(2, 3), steps=1)
    with pytest.raises(ValueError, match="batch dimension"):
        heun(denoiser, torch.tensor(1.0))
    assert heun(denoiser, torch.zeros(0, 3)).shape == (0, 3)
