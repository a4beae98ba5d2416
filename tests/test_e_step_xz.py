"""The ablation of the E-step that moves x instead of eps."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_alike, assert_within, column, e_step_xz, normals, seeded
from test_e_step import inputs, networks

from emd_fast import Noise, e_step
from emd_fast.diffusion.schedules import EDM, Cosine
from emd_fast.teachers import gaussian


def test_at_gamma_z_zero_it_is_the_same_chain():
    z, eps, t = inputs()
    options = {"steps": 4, "gamma_eps": 0.16, "gamma_z": 0.0, "noise": Noise(2)}
    assert_alike(*(run(*networks(), z, eps, t, **options) for run in (e_step_xz, e_step)), 5e-5)


def test_against_float64():
    z, eps, t = inputs()
    nets = networks()
    sizes = {"gamma_eps": torch.linspace(0.1, 0.3, 5), "gamma_z": torch.linspace(0.0, 0.05, 5)}
    result = e_step_xz(*nets, z, eps, t, steps=3, noise=Noise(4), **sizes)
    generator, teacher, fake_score = (copy.deepcopy(net).double() for net in nets)
    alpha, sigma = (column(f(t).double(), z) for f in (Cosine().alpha, Cosine().sigma))
    g_e, g_z = (column(s.double(), z) for s in sizes.values())
    latent, noises, x = z.double(), eps.double(), None
    for k in range(3):
        latent = latent.detach().requires_grad_()
        mean = alpha * generator(latent)
        x = mean.detach() + sigma * eps if x is None else x
        residual = (x - mean.detach()) / sigma**2
        (pull,) = torch.autograd.grad(mean, latent, residual)
        with torch.no_grad():
            delta = teacher.score(x, t) - fake_score.score(x, t)
            n, m = (normals((5, 3), seed=4, stream=stream, substep=k) for stream in (2, 3))
            x = x + g_e * sigma**2 * (delta - residual) + torch.sqrt(2 * g_e) * sigma * n
            noises = (1 - g_e) * noises + torch.sqrt(2 * g_e) * n
            latent = latent + g_z * (pull - latent) + torch.sqrt(2 * g_z) * m
    exact = (x - alpha * generator(latent)) / sigma
    # Divided by sigma^2 and sigma, some 30 roundings.
    assert_alike(result, SimpleNamespace(z=latent, eps=exact, drift=exact - noises), 2e-4)


@pytest.mark.parametrize("schedule", [EDM(), Cosine()], ids=repr)
def test_stationary_law_on_gaussians(schedule):
    """x of the density q(x) / p(x) N(x; alpha g, sigma^2) N(z) has the law q, as g and N(z) integrate to p."""
    n, d = 8192, 2
    A = torch.tensor([[1.0, 0.4], [0.0, 0.7]])
    S = torch.tensor([[0.8, -0.2], [-0.2, 1.1]])
    t = schedule.t_from_log_snr(torch.zeros(1)).expand(n).contiguous()
    g = seeded(0)
    latents = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
    result = e_step_xz(
        lambda z, cond: z @ A.T, gaussian(torch.zeros(d), S, schedule), gaussian(torch.zeros(d), A @ A.T, schedule),
        *latents, t, steps=150, gamma_eps=0.05, gamma_z=0.05, noise=Noise(0),
    )  # fmt: skip
    alpha, sigma = schedule.alpha(t[:1]).item(), schedule.sigma(t[:1]).item()
    x = (alpha * result.z @ A.T + sigma * result.eps).double()
    q = (alpha**2 * S + sigma**2 * torch.eye(d)).double()
    whitener = torch.linalg.inv(torch.linalg.cholesky(q))
    covariance = torch.cov((x @ whitener.T).T, correction=0)
    # Five standard errors sqrt(2 / n), and a bias of gamma lambda / 2 with lambda at most 3 here.
    assert_within(covariance, torch.eye(d, dtype=torch.float64), 5 * math.sqrt(2 / n) + 0.05 * 3 / 2)
