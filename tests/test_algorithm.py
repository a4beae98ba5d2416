"""What must hold of the algorithm (docs/algorithm.md): six statements, each against analytic values."""

import copy
import math

import pytest
import torch
from helpers import assert_within, column, normals, seeded
from test_e_step import denoiser, inputs

from emd_fast import Generator, Noise, e_step, ops
from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow
from emd_fast.em.fake_score_step import fake_score_step
from emd_fast.em.m_step import WEIGHTINGS, m_step
from emd_fast.teachers import gaussian

SCHEDULES = [EDM(), Cosine(), RectifiedFlow(), VP(torch.linspace(1e-4, 0.02, 1000))]
FORMS = [("eps", SCHEDULES[3]), ("x0", Cosine()), ("v", Cosine()), ("flow", RectifiedFlow()), ("edm", EDM())]


class Linear(torch.nn.Module):
    def __init__(self, A):
        super().__init__()
        self.A = torch.nn.Parameter(A.clone())

    def forward(self, z, cond=None):
        return z @ self.A.T

    def score(self, schedule):
        """The exact fake score: the score of the generator's diffused samples."""
        A = self.A.detach().double()
        return gaussian(torch.zeros(2), A @ A.T, schedule)


def gradient(loss, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))])


@pytest.mark.parametrize(("form", "schedule"), FORMS, ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_1_one_step_is_variational_score_distillation(backend, form, schedule, weighting):
    """K = 1 at gamma_z = 0: gamma_eps times the gradient -w alpha delta J_g of Diff-Instruct, for the same noise."""
    gamma = 0.16
    z, eps, t = inputs(16, schedule=schedule)
    teacher, fake_score = denoiser(form, schedule, 1), denoiser(form, schedule, 2)
    generator = Generator(denoiser(form, schedule, 3), float(schedule.t_from_log_snr(torch.tensor([-1.0]))))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    weight = WEIGHTINGS[weighting](alpha, sigma)
    result = e_step(generator, teacher, fake_score, z, eps, t, steps=1, gamma_eps=gamma, gamma_z=0.0, noise=Noise(0))
    mine = gradient(m_step(generator, result, weight).mean(), generator)
    wide = [copy.deepcopy(net).double() for net in (generator, teacher, fake_score)]
    x0 = wide[0](z.double())
    a, s, w = (column(v.double(), z) for v in (alpha, sigma, weight))
    with torch.no_grad():
        x_t = a * x0 + s * eps
        delta = wide[1].score(x_t, t) - wide[2].score(x_t, t)
    vsd = gradient(-(w * a * delta * x0).mean(), wide[0])
    # float32 networks and coefficients; delta is a difference.
    assert_within(mine, gamma * vsd, 2e-5 * float(vsd.abs().max()))
    assert mine.abs().max() > 1e-3 * gamma * vsd.abs().max()


@pytest.mark.parametrize(("form", "schedule"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_2_equal_networks_leave_exactly_nothing(backend, form, schedule, dtype):
    z, eps, t = inputs(9, schedule=schedule)
    teacher = denoiser(form, schedule, 1).to(dtype)
    fake_score, generator = copy.deepcopy(teacher), Generator(copy.deepcopy(teacher), 0.9)
    result = e_step(generator, teacher, fake_score, z, eps, t, steps=3, gamma_eps=0.16, gamma_z=0.01, noise=Noise(0))
    assert not result.drift.any()
    loss = m_step(generator, result, torch.ones(9))
    assert not loss.any() and not gradient(loss.sum(), generator).any()
    assert float(result.eps.std()) > 0.5, "the chain itself moves"


@pytest.mark.parametrize("gamma_z", [0.0, 0.02])
@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("integrator", ["euler", "exact"])
def test_3_eps_minus_drift_is_the_accumulated_noise(backend, gamma_z, by_sample, integrator):
    """a_{k+1} = (1 - gamma) a_k + scale n_k from a_0 = eps_0, the noises regenerated from the contract."""
    schedule, steps = Cosine(), 6
    z, eps, t = inputs(7, schedule=schedule)
    gamma = 0.05 + 0.3 * torch.rand(7, generator=seeded(1)) if by_sample else 0.16
    nets = Generator(denoiser("v", schedule, 3), 0.8), denoiser("v", schedule, 1), denoiser("x0", schedule, 2)
    where = {"seed": 2**40 + 3, "step": 12, "first_sample": 1000}
    sizes = {"gamma_eps": gamma, "gamma_z": gamma_z, "integrator": integrator}
    result = e_step(*nets, z, eps, t, steps=steps, noise=Noise(**where), **sizes)
    a = eps.double()
    gamma = column(gamma.double(), z) if by_sample else gamma
    scale = (gamma * (2 - gamma if integrator == "exact" else 2)) ** 0.5
    for k in range(steps):
        a = (1 - gamma) * a + scale * normals((7, 3), stream=2, substep=k, **where)
    # Six steps of float32, and of normals within 5e-6: both decay with the chain.
    size = 1 + float(result.drift.abs().max())
    assert result.drift.abs().max() > 1e-2
    assert_within(result.eps - result.drift, a, 2e-6 * size * steps + 1e-5)


SIGMA = torch.tensor([[0.9, -0.3], [-0.3, 0.6]])
MEAN = torch.tensor([0.4, -0.2])
GENERATORS = {"wide": torch.tensor([[1.4, 0.5], [0, 1.1]]), "turned": torch.tensor([[0.5, -0.4], [0.5, 0.5]])}


def stiffest(A, schedule, t):
    """The largest eigenvalue of C_p C_q^-1: that of the chain's Hessian in x_t (the others are 1)."""
    alpha, sigma = schedule.alpha(t[:1]).double(), schedule.sigma(t[:1]).double()
    noise = sigma**2 * torch.eye(2, dtype=torch.float64)
    p, q = alpha**2 * A.double() @ A.double().T + noise, alpha**2 * SIGMA.double() + noise
    return float(torch.linalg.eigvals(p @ torch.linalg.inv(q)).real.max()), q


def chain(A, schedule, n, log_snr, gamma, steps, seed=0, gamma_z=None, integrator="euler"):
    g = seeded(seed)
    t = schedule.t_from_log_snr(torch.tensor([log_snr])).expand(n).contiguous()
    z, eps, generator = torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g), Linear(A)
    nets = generator, gaussian(MEAN, SIGMA, schedule), generator.score(schedule)
    sizes = {"gamma_eps": gamma, "gamma_z": gamma if gamma_z is None else gamma_z, "integrator": integrator}
    result = e_step(*nets, z, eps, t, steps=steps, noise=Noise(seed), **sizes)
    alpha, sigma = result.alpha[:1], result.sigma[:1]
    return t, alpha * result.z @ A.T + sigma * result.eps


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", GENERATORS)
def test_4_a_long_chain_samples_the_teacher(schedule, name):
    """x_t ends as N(alpha m, alpha^2 Sigma + sigma^2), whatever the generator."""
    # Where the Hessian is lambda, the variance has a bias of 1 / (1 - gamma lambda / 2); means have none. Five sampling
    # errors: 1 / sqrt(n) of a mean, sqrt(2 / n) of a variance. The start has decayed by e^-8, as lambda > 0.4 here.
    A, n, gamma, steps = GENERATORS[name], 4096, 0.06, 170
    t, x = chain(A, schedule, n, 0.5, gamma, steps)
    stiffness, q = stiffest(A, schedule, t)
    whiten = torch.linalg.inv(torch.linalg.cholesky(q))
    w = (x.double() - schedule.alpha(t[:1]).double() * MEAN) @ whiten.T
    assert_within(w.mean(0), torch.zeros(2), 5 / math.sqrt(n) + 1e-2, "mean")
    bias = 1 / (1 - gamma * stiffness / 2) - 1
    assert bias < 0.1
    assert_within(torch.cov(w.T, correction=0), torch.eye(2), 5 * math.sqrt(2 / n) + bias, "covariance")


@pytest.mark.slow
def test_4_the_bias_is_of_order_gamma():
    """Along the stiffest direction: the variance is 1 / (1 - gamma lambda / 2), to the sampling error."""
    A, schedule, n = GENERATORS["wide"], Cosine(), 40_000
    for gamma, steps in ((0.4, 40), (0.2, 80)):
        t, x = chain(A, schedule, n, 0.5, gamma, steps)
        alpha, sigma = schedule.alpha(t[:1]).double(), schedule.sigma(t[:1]).double()
        stiffness, q = stiffest(A, schedule, t)
        p = alpha**2 * (A @ A.T).double() + sigma**2 * torch.eye(2, dtype=torch.float64)
        # x moves by -gamma C_p C_q^-1 (x - alpha m) and noise of 2 gamma C_p: along a left eigenvector v of that matrix
        # the variance is v' C_p v / (lambda - gamma lambda^2 / 2).
        values, vectors = torch.linalg.eig((p @ torch.linalg.inv(q)).T)
        v = vectors.real[:, values.real.argmax()]
        exact = (v @ p @ v) / (stiffness * (1 - gamma * stiffness / 2))
        assert abs(exact / (v @ q @ v) - 1) > 0.1 * gamma
        along = (x.double() - alpha * MEAN) @ v
        assert abs(float(along.var()) / float(exact) - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0.16, 0.36])
def test_4_the_exact_integrator_halves_the_bias(gamma):
    """Error of the covariance of x_t after a long chain with a small gamma_z, beside Euler's."""
    A, schedule, errors = GENERATORS["turned"], Cosine(), {}
    for integrator in ("euler", "exact"):
        t, x = chain(A, schedule, 40_000, 0.5, gamma, 600, gamma_z=0.01, integrator=integrator)
        _, q = stiffest(A, schedule, t)
        whiten = torch.linalg.inv(torch.linalg.cholesky(q))
        covariance = torch.cov((x.double() @ whiten.T).T)
        errors[integrator] = float((covariance - torch.eye(2)).norm())
    assert errors["exact"] < 0.5 * errors["euler"]


@pytest.mark.slow
def test_4_the_exact_integrator_keeps_the_prior():
    """Equal networks: delta is 0, and the variance of eps and z stays 1, where Euler's grows to 1 / (1 - gamma / 2)."""
    net, schedule, n, gamma = denoiser("v", Cosine(), 1), Cosine(), 2**20, 0.16
    g = seeded(0)
    z, eps = torch.randn(n, 3, generator=g), torch.randn(n, 3, generator=g)
    t = schedule.t_from_log_snr(torch.zeros(n))
    for integrator, variance in (("exact", 1.0), ("euler", 1 / (1 - gamma / 2))):
        sizes = {"gamma_eps": gamma, "gamma_z": gamma, "integrator": integrator}
        found = e_step(lambda z, cond: z, net, net, z, eps, t, steps=40, noise=Noise(1), **sizes)
        for state in (found.eps, found.z):
            assert abs(float(state.double().var()) / variance - 1) < 2e-3


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("name", GENERATORS)
def test_5_training_finds_the_maximum_likelihood(schedule, name):
    """A A^T = Sigma: there drift is 0 for every sample, so the tolerance is that of an optimisation not quite ended."""
    generator = Linear(GENERATORS[name])
    teacher = gaussian(torch.zeros(2), SIGMA, schedule)
    steps, n = 220, 128
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.05, betas=(0.5, 0.9))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    noise = Noise(0)
    for _ in range(steps):
        t = schedule.t_from_log_snr(3 * ops.uniform((n,), noise, stream=6) - 1)
        z, eps = ops.normal((n, 2), noise, stream=0), ops.normal((n, 2), noise, stream=1)
        nets = generator, teacher, generator.score(schedule)
        result = e_step(*nets, z, eps, t, steps=2, gamma_eps=0.2, gamma_z=0.1, noise=noise)
        optimizer.zero_grad()
        m_step(generator, result, result.sigma.square()).mean().backward()
        optimizer.step()
        decay.step()
        noise.advance()
    A = generator.A.detach()
    assert float((GENERATORS[name] @ GENERATORS[name].T - SIGMA).norm()) > 0.3
    assert_within(A @ A.T, SIGMA, 0.015)


def gradients_by_sample(A, gamma_z, cancellation, n=20_000):
    """(n, 4): every sample's gradient to A."""
    schedule, generator, g = Cosine(), Linear(A), seeded(3)
    t = schedule.t_from_log_snr(3 * torch.rand(n, generator=g) - 1)
    z, eps = torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g)
    nets = generator, gaussian(torch.zeros(2), SIGMA, schedule), generator.score(schedule)
    result = e_step(*nets, z, eps, t, steps=4, gamma_eps=0.16, gamma_z=gamma_z, noise=Noise(0))
    x = generator(result.z).detach().requires_grad_()
    drift = result.drift if cancellation else result.eps
    loss = ops.m_step_loss(x, drift, result.alpha, result.sigma, result.sigma.square())
    (to_x,) = torch.autograd.grad(loss.sum(), x)
    return torch.einsum("bi,bj->bij", to_x.double(), result.z.double()).flatten(1)


@pytest.mark.parametrize("gamma_z", [0.0, 0.1])
def test_6_cancellation_lowers_the_variance_and_keeps_the_mean_at_gamma_z_zero(gamma_z):
    with_it, without = (gradients_by_sample(GENERATORS["wide"], gamma_z, c) for c in (True, False))
    difference = without - with_it
    error = difference.std(0) / math.sqrt(len(difference))
    if gamma_z:  # z_K is correlated with the noises that are dropped
        assert bool((difference.mean(0).abs() > 5 * error).any())
    else:
        assert_within(difference.mean(0), torch.zeros(4), 5 * float(error.max()), "mean")
        assert bool((with_it.mean(0).abs() > 5 * with_it.std(0) / math.sqrt(len(with_it))).any()), "there is a gradient"
    assert bool((with_it.var(0) < (1.0 if gamma_z else 0.6) * without.var(0)).all())


@pytest.mark.parametrize("gamma_z", [0.0, 0.1])
def test_6_the_fixed_point_stays(gamma_z):
    """At A A^T = Sigma the mean gradient is 0 without cancellation, and with it every sample's is."""
    A = torch.linalg.cholesky(SIGMA)
    exactly = gradients_by_sample(A, gamma_z, True)
    assert float(exactly.abs().max()) < 1e-4  # scores that agree to float32
    without = gradients_by_sample(A, gamma_z, False)
    error = without.std(0) / math.sqrt(len(without))
    assert_within(without.mean(0), torch.zeros(4), 5 * float(error.max()))
    assert float(without.std()) > 0.05


@pytest.mark.parametrize(("form", "schedule"), FORMS, ids=str)
def test_fake_score_step_is_denoising_score_matching(backend, form, schedule):
    z, eps, t = inputs(8, schedule=schedule)
    fake_score = denoiser(form, schedule, 2)
    generator = Generator(denoiser(form, schedule, 3), float(schedule.t_from_log_snr(torch.tensor([-1.0]))))
    loss = fake_score_step(generator, fake_score, z, eps, t)
    assert loss.shape == (8,)
    mine = gradient(loss.mean(), fake_score)
    wide, made = copy.deepcopy(fake_score).double(), copy.deepcopy(generator).double()(z.double()).detach()
    a, s = (column(f(t).double(), z) for f in (schedule.alpha, schedule.sigma))
    x_t = a * made + s * eps
    c_skip, c_out = (column(c.double(), z) for c in fake_score.coefficients(t))
    target = (made - c_skip * x_t) / c_out
    exact = (wide(x_t, t) - target).square().mean(1)
    assert_within(loss, exact, 2e-4 * float(1 + exact.detach().abs().max()))
    expected = gradient(exact.mean(), wide)
    assert_within(mine, expected, 2e-4 * float(expected.abs().max()))
    assert all(p.grad is None for p in generator.parameters())
