"""Raw network outputs as affine scores: the table of docs/algorithm.md, real networks, guidance."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import Mlp, assert_all_same, assert_same, assert_within, column, naming, randomised, seeded
from torch import nn

from emd_fast import Denoiser, Generator
from emd_fast.diffusion.denoiser import unwrap
from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow
from emd_fast.teachers import gaussian

BETAS = torch.linspace(1e-4, 0.02, 1000)
SD = 0.5
SCHEDULES = [EDM(), Cosine(), RectifiedFlow(), VP(BETAS)]
CASES = [(form, schedule) for form in ("eps", "x0") for schedule in SCHEDULES]
CASES += [("v", Cosine()), ("v", VP(BETAS)), ("flow", RectifiedFlow()), ("edm", EDM())]


def make(form, schedule, network=None, **options):
    options |= {"sigma_data": SD} if form == "edm" else {}
    return Denoiser(network or (lambda x, t, cond: x), schedule, form, **options)


def times(schedule, n=64):
    """Log-SNR from 16 to -12, where the schedule has it."""
    log_snr = torch.linspace(-12.0, 16.0, n)
    return schedule.t_from_log_snr(log_snr).clamp(schedule.t_min, schedule.t_max)


def training_target(parametrization, alpha, sigma, x, eps):
    """What a network of this parametrization learns to return, from the definition of its name."""
    total = sigma**2 + SD**2
    return {
        "eps": eps,
        "x0": x,
        "v": alpha * eps - sigma * x,
        "flow": eps - x,
        "edm": (x - SD**2 / total * (alpha * x + sigma * eps)) / (sigma * SD / torch.sqrt(total)),
    }[parametrization]


def exact_levels(parametrization, schedule, t):
    """float64 alpha and sigma that fulfil the relation of the parametrization exactly, near those of float32."""
    alpha, sigma = schedule.alpha(t).double(), schedule.sigma(t).double()
    if parametrization == "v":
        sigma = torch.where(alpha > sigma, sigma, torch.sqrt(1 - alpha**2))
        alpha = torch.where(alpha > sigma, torch.sqrt(1 - sigma**2), alpha)
    if parametrization == "flow":
        alpha, sigma = 1 - t.double(), t.double()
    return alpha, sigma


@pytest.mark.parametrize(("parametrization", "schedule"), CASES, ids=str)
def test_a_perfect_output_gives_the_image_and_closed_forms_are_the_general_formula(parametrization, schedule):
    t = times(schedule)
    alpha, sigma = exact_levels(parametrization, schedule, t)
    g = seeded(0)
    x, eps = (torch.randn(len(t), generator=g, dtype=torch.float64) for _ in range(2))
    F, x_t = training_target(parametrization, alpha, sigma, x, eps), alpha * x + sigma * eps
    denoiser = make(parametrization, schedule)
    c_skip, c_out = denoiser._form.denoised(alpha, sigma)
    scale = 1 + (c_skip * x_t).abs() + (c_out * F).abs()
    assert_within(c_skip * x_t + c_out * F, x, 1e-10 * scale, "D")
    a, b = (alpha * c_skip - 1) / sigma**2, alpha * c_out / sigma**2
    if parametrization == "edm":
        a = -1 / (sigma**2 + SD**2)  # the general formula cancels at small sigma even in float64
    found, exact_ones = (*denoiser.coefficients(t), *denoiser.score_coefficients(t)), (c_skip, c_out, a, b)
    for what, mine, exact in zip(("c_skip", "c_out", "a", "b"), found, exact_ones, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == t.shape
        # Some roundings, each 6e-8, and those of alpha and sigma; for a what float64 loses when 1 - 1 is over sigma^2.
        lost = 1e-15 / sigma**2 if what == "a" else 0.0
        assert_within(mine, exact, 4e-6 * exact.abs() + lost, what)


def test_denoise_and_score_use_the_coefficients_and_are_float32():
    teacher = Mlp(seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        denoiser = make("v", Cosine(), copy.deepcopy(teacher).to(dtype))
        x, t = torch.randn(4, 3), torch.tensor([0.1, 0.4, 0.7, 0.9])
        F = denoiser(x, t)
        assert F.dtype == dtype
        alpha, sigma = (column(f(t), x) for f in (Cosine().alpha, Cosine().sigma))
        assert_same(denoiser.denoise(x, t), alpha * x + -sigma * F.float())
        assert denoiser.score(x, t).dtype == torch.float32
        assert_within(denoiser.score(x, t), (alpha * denoiser.denoise(x, t) - x) / sigma**2, 1e-4)


def test_arguments_of_the_network():
    seen = []
    network = lambda x, t, cond: seen.append((x, t, cond)) or x  # noqa: E731
    x, t = torch.randn(2, 3, 4, 4), torch.tensor([0.2, 0.6])
    make("v", Cosine(), network)(x, t, "condition")
    make("v", Cosine(), network, c_in=lambda t: 2 * t, c_noise=lambda t: 1000 * t)(x, t)
    make("edm", EDM(), network)(x, t)
    (x0, t0, c0), (x1, t1, c1), (x2, t2, _) = seen
    assert c0 == "condition" and c1 is None
    assert_all_same((x0, t0, x1, t1), (x, t, column(2 * t, x) * x, 1000 * t))
    assert_within(x2, x.double() / column(torch.sqrt(t.double() ** 2 + SD**2), x), 1e-6)
    assert_within(t2, torch.log(t.double()) / 4, 1e-6)


class TestRealNetworks:
    def test_a_learned_variance(self):
        network = randomised(nn.Conv2d(3, 6, 3, padding=1), 2)
        call = lambda x, t, cond: network(x)  # noqa: E731
        denoiser = Denoiser(call, VP(BETAS), "eps", output=lambda F: F[:, :3])
        x, t = torch.randn(2, 3, 5, 5), torch.tensor([0.3, 0.9])
        assert_same(denoiser(x, t), network(x)[:, :3])
        with pytest.raises(ValueError, match=r"shape.*output"):
            Denoiser(call, VP(BETAS), "eps")(x, t)
        with pytest.raises(TypeError, match=r"output.*sample"):
            Denoiser(lambda x, t, cond: SimpleNamespace(sample=x), VP(BETAS), "eps")(x, t)

    def test_a_flow_model_of_reversed_sign(self):
        """Models that return x - eps give, with output=neg, the exact scores of N(0, 4)."""
        t = torch.tensor([0.05, 0.3, 0.95])
        x_t = torch.randn(3, 7)
        c = column(t, x_t)
        total = 4 * (1 - c) ** 2 + c**2
        network = lambda x, t, cond: 4 * (1 - c) * x / total - c * x / total  # noqa: E731
        denoiser = Denoiser(network, RectifiedFlow(), "flow", output=torch.neg)
        assert_within(denoiser.score(x_t, t), -x_t / total, 2e-5)
        assert_within(denoiser.denoise(x_t, t), 4 * (1 - c) * x_t / total, 2e-6)

    @pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
    def test_one_that_returns_the_denoised_image(self, schedule):
        t, x_t = times(schedule, 5), torch.randn(5, 4)
        alpha, sigma = (column(f(t), x_t).double() for f in (schedule.alpha, schedule.sigma))
        total = 0.25 * alpha**2 + sigma**2
        denoiser = Denoiser.from_x0(lambda x, t, cond: (0.25 * alpha * x / total).float(), schedule, sample_shape=(4,))
        assert denoiser.sample_shape == (4,)
        assert_within(denoiser.denoise(x_t, t), 0.25 * alpha * x_t / total, 1e-6)
        score = -x_t / total
        assert_within(denoiser.score(x_t, t), score, (1e-6 * x_t.abs() / sigma**2).double() + 1e-6)


def guided(**options):
    return make("v", Cosine(), Mlp(classes=11, seed=3), **options)


class TestGuidance:
    x, t = torch.randn(4, 3, generator=seeded(5)), torch.tensor([0.1, 0.4, 0.7, 0.9])
    labels = torch.tensor([0, 3, 7, 9])

    def expected(self, denoiser, cond, null, w):
        F_c, F_u = denoiser(self.x, self.t, cond).double(), denoiser(self.x, self.t, null).double()
        a, b = (column(c, self.x).double() for c in denoiser.score_coefficients(self.t))
        return a * self.x + b * (F_u + w * (F_c - F_u))

    @pytest.mark.parametrize("w", [0.0, 1.0, 2.5, 7, torch.tensor([0.0, 1.0, 2.0, 5.0])])
    @pytest.mark.parametrize("null", [10, torch.tensor([10]), torch.full((4,), 10)], ids=["int", "one", "batch"])
    def test_a_number_and_every_form_of_a_null_condition(self, w, null):
        denoiser = guided(null_cond=null)
        by_sample = w[:, None] if isinstance(w, torch.Tensor) else w
        expected = self.expected(denoiser, self.labels, torch.full((4,), 10), by_sample)
        score = denoiser.score(self.x, self.t, self.labels, guidance=w)
        assert_within(score, expected, 1e-5 * float(expected.abs().max()))

    def test_a_pytree(self):
        cond = {"label": self.labels, "size": torch.randn(4, 2)}
        null = {"label": torch.tensor([10]), "size": torch.zeros(1, 2)}
        denoiser = guided(null_cond=null)
        expected = self.expected(denoiser, cond, {"label": torch.full((4,), 10)}, 3.0)
        assert_within(denoiser.score(self.x, self.t, cond, guidance=3.0), expected, 1e-5 * float(expected.abs().max()))

    def test_denoise_is_guided_alike(self):
        denoiser = guided(null_cond=10)
        alpha, sigma = (column(f(self.t), self.x) for f in (Cosine().alpha, Cosine().sigma))
        D = denoiser.denoise(self.x, self.t, self.labels, guidance=2.0)
        assert denoiser.score(self.x[:0], self.t[:0], self.labels[:0], guidance=2.0).shape == (0, 3)
        score = denoiser.score(self.x, self.t, self.labels, guidance=2.0)
        assert_within((alpha * D - self.x) / sigma**2, score, 1e-3)

    @pytest.mark.parametrize(
        ("null", "cond", "named"),
        [
            (None, labels, "null"),
            (10, None, "cond"),
            ({"other": torch.tensor([10])}, {"label": labels}, "null_cond"),
            (torch.tensor([10]), {"label": labels}, "null_cond"),
            (10, {"label": labels}, "null_cond"),
        ],
    )
    def test_conditions_that_do_not_fit(self, null, cond, named):
        with pytest.raises(ValueError, match=naming(named)):
            guided(null_cond=null).score(self.x, self.t, cond, guidance=2.0)


TIMES = [torch.full(shape, 0.5) for shape in ((), (1,), (2, 1), (3,))]


def of(schedule, form, **options):
    return lambda: Denoiser(nn.Identity(), schedule, form, **options)


def generator_at(t_star, **options):
    return lambda: Generator(make("edm", EDM()), t_star, **options)


@pytest.mark.parametrize(
    ("error", "named", "calls"),
    [
        (ValueError, "parametrization", [of(Cosine(), form) for form in ("epsilon", "", None, "V")]),
        (ValueError, "v", [of(EDM(), "v"), of(RectifiedFlow(), "v")]),
        (ValueError, "flow", [of(schedule, "flow") for schedule in (Cosine(), EDM(), VP(BETAS))]),
        (ValueError, "edm", [of(x, "edm", sigma_data=0.5) for x in (Cosine(), RectifiedFlow(), VP(BETAS))]),
        (ValueError, "sigma_data", [of(EDM(), "edm", sigma_data=x) for x in (None, 0.0, -1.0, math.nan)]),
        (ValueError, "sigma_data", [of(EDM(), "eps", sigma_data=0.5)]),
        (ValueError, "t must have shape", [partial(make("v", Cosine()), torch.randn(2, 3), t) for t in TIMES]),
        (TypeError, "Denoiser", [lambda: unwrap(nn.Linear(1, 1))]),
        (ValueError, "t must be in", [generator_at(t) for t in (-1.0, math.nan, math.inf)]),
        (ValueError, "input_scale", [generator_at(1.0, input_scale=x) for x in (0.0, -1.0, math.nan)]),
    ],
)
def test_bad_input_is_named(error, named, calls):
    for call in calls:
        with pytest.raises(error, match=naming(named)):
            call()


def test_same_form():
    v = make("v", Cosine())
    assert v.same_form(make("v", Cosine())) and v.same_form(copy.deepcopy(v))
    assert not v.same_form(make("eps", Cosine())) and not v.same_form(make("v", VP(BETAS)))
    assert not make("edm", EDM()).same_form(Denoiser(nn.Identity(), EDM(), "edm", sigma_data=0.4))


class TestGenerator:
    @pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
    def test_is_the_denoiser_at_its_level(self, schedule):
        teacher = gaussian(torch.tensor([1.0, -1.0]), 0.25 * torch.eye(2), schedule)
        t_star = float(schedule.t_from_log_snr(torch.tensor([-3.0])))
        z = torch.randn(6, 2)
        t = torch.full((6,), t_star)
        sigma = schedule.sigma(t)[:, None]
        assert_within(Generator(teacher, t_star)(z), teacher.denoise(sigma * z, t), 1e-5)
        assert_within(Generator(teacher, t_star, input_scale=3.0)(z), teacher.denoise(3 * z, t), 1e-5)

    def test_gradient_reaches_latent_and_parameters(self):
        g = Generator(make("edm", EDM(), Mlp()), 2.0)
        z = torch.randn(2, 3, requires_grad=True)
        g(z).sum().backward()
        assert z.grad.abs().sum() > 0 and all(p.grad is not None for p in g.parameters())
