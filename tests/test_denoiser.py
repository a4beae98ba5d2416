"""Raw network outputs as affine scores: the table of docs/algorithm.md, real networks, guidance."""

import copy
import math

import pytest
import torch
from helpers import Mlp, assert_same, assert_within, column, naming, randomised, seeded
from torch import nn

from emd_fast import Denoiser, Generator
from emd_fast.diffusion.denoiser import unwrap
from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow
from emd_fast.teachers import gaussian

BETAS = torch.linspace(1e-4, 0.02, 1000)
SD = 0.5
CASES = [
    ("eps", EDM()), ("eps", Cosine()), ("eps", RectifiedFlow()), ("eps", VP(BETAS)),
    ("x0", EDM()), ("x0", Cosine()), ("x0", RectifiedFlow()), ("x0", VP(BETAS)),
    ("v", Cosine()), ("v", VP(BETAS)),
    ("flow", RectifiedFlow()),
    ("edm", EDM()),
]  # fmt: skip


def make(parametrization, schedule, network=None, **options):
    sigma_data = {"sigma_data": SD} if parametrization == "edm" else {}
    return Denoiser(network or (lambda x, t, cond: x), schedule, parametrization, **sigma_data, **options)


def times(schedule, n=64):
    """Log-SNR from 16 to -12, where the schedule has it."""
    log_snr = torch.linspace(-12.0, 16.0, n)
    return schedule.t_from_log_snr(log_snr).clamp(schedule.t_min, schedule.t_max)


def training_target(parametrization, alpha, sigma, x, eps):
    """What a network of this parametrization learns to return, from the definition of its name."""
    match parametrization:
        case "eps":
            return eps
        case "x0":
            return x
        case "v":
            return alpha * eps - sigma * x
        case "flow":
            return eps - x
        case "edm":
            x_t = alpha * x + sigma * eps
            c_skip = SD**2 / (sigma**2 + SD**2)
            return (x - c_skip * x_t) / (sigma * SD / torch.sqrt(sigma**2 + SD**2))


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
def test_perfect_output_gives_back_image_and_score(parametrization, schedule):
    """In float64: D = x and s = -eps / sigma, whatever the parametrization."""
    t = times(schedule)
    alpha, sigma = exact_levels(parametrization, schedule, t)
    g = seeded(0)
    x, eps = (torch.randn(len(t), generator=g, dtype=torch.float64) for _ in range(2))
    F, x_t = training_target(parametrization, alpha, sigma, x, eps), alpha * x + sigma * eps
    c_skip, c_out = make(parametrization, schedule)._form.denoised(alpha, sigma)
    a, b = make(parametrization, schedule)._form.score(alpha, sigma)
    scale = 1 + (c_skip * x_t).abs() + (c_out * F).abs()
    assert_within(c_skip * x_t + c_out * F, x, 1e-10 * scale, "D")
    scale = 1 + (a * x_t).abs() + (b * F).abs()
    assert_within(a * x_t + b * F, -eps / sigma, 1e-10 * scale, "score")


@pytest.mark.parametrize(("parametrization", "schedule"), CASES, ids=str)
def test_closed_forms_against_the_general_formula(parametrization, schedule):
    """a = (alpha c_skip - 1) / sigma^2 and b = alpha c_out / sigma^2 by the general formula, evaluated in float64."""
    t = times(schedule)
    alpha, sigma = exact_levels(parametrization, schedule, t)
    denoiser = make(parametrization, schedule)
    c_skip, c_out = denoiser._form.denoised(alpha, sigma)
    a, b = (alpha * c_skip - 1) / sigma**2, alpha * c_out / sigma**2
    if parametrization == "edm":
        a = -1 / (sigma**2 + SD**2)  # the general formula cancels at small sigma even in float64
    for what, mine, exact in zip(
        ("c_skip", "c_out", "a", "b"),
        (*denoiser.coefficients(t), *denoiser.score_coefficients(t)),
        (c_skip, c_out, a, b),
        strict=True,
    ):
        assert mine.dtype == torch.float32 and mine.shape == t.shape
        # Some roundings, each 6e-8, and those of alpha and sigma; for a what float64 loses when 1 - 1 is over sigma^2.
        lost = 1e-15 / sigma**2 if what == "a" else 0.0
        assert_within(mine, exact, 4e-6 * exact.abs() + lost, what)


@pytest.mark.parametrize(("parametrization", "schedule"), CASES, ids=str)
def test_small_noise_does_not_cancel(parametrization, schedule):
    """At log-SNR 15 the score of N(0, 1) is -x_t / (alpha^2 + sigma^2) to float32, relative to its terms."""
    t = schedule.t_from_log_snr(torch.tensor([15.0])).clamp(min=schedule.t_min)
    alpha, sigma = exact_levels(parametrization, schedule, t)
    x_t = torch.linspace(-2, 2, 41, dtype=torch.float64)
    total = alpha**2 + sigma**2
    # The exact denoiser of N(0, 1).
    x, eps = alpha * x_t / total, sigma * x_t / total
    F = training_target(parametrization, alpha, sigma, x, eps)
    a, b = make(parametrization, schedule).score_coefficients(t)
    score = a * x_t.float() + b * F.float()
    terms = (a * x_t).abs().double() + (b * F).abs().double()
    assert_within(score, -x_t / total, 2e-6 * terms + 1e-6)
    if parametrization in ("v", "edm"):
        # And a itself stays small, where the general formula adds terms of 1 / sigma^2.
        assert float(a.abs()) <= 4.0 + 1e-3


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
    assert_same(x0, x)
    assert_same(t0, t)
    assert c0 == "condition" and c1 is None
    assert_same(x1, column(2 * t, x) * x)
    assert_same(t1, 1000 * t)
    assert_within(x2, x.double() / column(torch.sqrt(t.double() ** 2 + SD**2), x), 1e-6)
    assert_within(t2, torch.log(t.double()) / 4, 1e-6)


class TestRealNetworks:
    def test_a_unet_of_diffusers(self):
        diffusers = pytest.importorskip("diffusers")
        network = diffusers.UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8, norm_num_groups=8, attention_head_dim=4,
        ).eval()  # fmt: skip
        randomised(network, 1)
        schedule = VP(BETAS)
        denoiser = Denoiser(
            network, schedule, "eps", c_noise=lambda t: torch.round(t * 999), output=lambda returned: returned.sample
        )
        x, words = torch.randn(3, 3, 8, 8), torch.randn(3, 5, 8)
        index = torch.tensor([0, 37, 999])
        t = index / 999
        with torch.no_grad():
            raw = network(x, index, encoder_hidden_states=words).sample
            assert raw.abs().mean() > 1e-2
            assert_within(denoiser(x, t, words), raw, 1e-5 * float(raw.abs().max()))
            products = torch.cumprod(1 - BETAS.double(), 0)[index]
            D = (x - column((1 - products).sqrt(), x) * raw.double()) / column(products.sqrt(), x)
            assert_within(denoiser.denoise(x, t, words), D, 2e-6 * float(D.abs().max()) + 1e-5)
            score = -raw.double() / column((1 - products).sqrt(), x)
            assert_within(denoiser.score(x, t, words), score, 1e-5 * float(score.abs().max()))
        with pytest.raises(TypeError, match=r"output.*sample"):
            Denoiser(network, schedule, "eps", c_noise=lambda t: t * 999)(x, t, words)

    def test_a_learned_variance(self):
        network = randomised(nn.Conv2d(3, 6, 3, padding=1), 2)
        call = lambda x, t, cond: network(x)  # noqa: E731
        denoiser = Denoiser(call, VP(BETAS), "eps", output=lambda F: F[:, :3])
        x, t = torch.randn(2, 3, 5, 5), torch.tensor([0.3, 0.9])
        assert_same(denoiser(x, t), network(x)[:, :3])
        with pytest.raises(ValueError, match=r"shape.*output"):
            Denoiser(call, VP(BETAS), "eps")(x, t)

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

    @pytest.mark.parametrize("schedule", [EDM(), Cosine(), RectifiedFlow(), VP(BETAS)], ids=repr)
    def test_one_that_returns_the_denoised_image(self, schedule):
        t, x_t = times(schedule, 5), torch.randn(5, 4)
        alpha, sigma = (column(f(t), x_t).double() for f in (schedule.alpha, schedule.sigma))
        total = 0.25 * alpha**2 + sigma**2
        denoiser = Denoiser.from_x0(lambda x, t, cond: (0.25 * alpha * x / total).float(), schedule, sample_shape=(4,))
        assert denoiser.sample_shape == (4,)
        assert_within(denoiser.denoise(x_t, t), 0.25 * alpha * x_t / total, 1e-6)
        score = -x_t / total
        assert_within(denoiser.score(x_t, t), score, (1e-6 * x_t.abs() / sigma**2).double() + 1e-6)

    def test_the_dtype_of_the_network_decides_what_it_is_given(self):
        network = Mlp(seed=0).to(torch.bfloat16)
        assert make("x0", Cosine(), network)(torch.randn(2, 3), torch.tensor([0.5, 0.6])).dtype == torch.bfloat16


class TestGuidance:
    def denoiser(self, **options):
        return make("v", Cosine(), Mlp(classes=11, seed=3), **options)

    x, t = torch.randn(4, 3, generator=seeded(5)), torch.tensor([0.1, 0.4, 0.7, 0.9])
    labels = torch.tensor([0, 3, 7, 9])

    def expected(self, denoiser, cond, null, w):
        F_c, F_u = denoiser(self.x, self.t, cond).double(), denoiser(self.x, self.t, null).double()
        a, b = (column(c, self.x).double() for c in denoiser.score_coefficients(self.t))
        return a * self.x + b * (F_u + w * (F_c - F_u))

    @pytest.mark.parametrize("w", [0.0, 1.0, 2.5, 7])
    @pytest.mark.parametrize("null", [10, torch.tensor([10]), torch.full((4,), 10)], ids=["int", "one", "batch"])
    def test_a_number_and_every_form_of_a_null_condition(self, w, null):
        denoiser = self.denoiser(null_cond=null)
        expected = self.expected(denoiser, self.labels, torch.full((4,), 10), w)
        assert_within(
            denoiser.score(self.x, self.t, self.labels, guidance=w), expected, 1e-5 * float(expected.abs().max())
        )

    def test_by_sample(self):
        denoiser, w = self.denoiser(null_cond=10), torch.tensor([0.0, 1.0, 2.0, 5.0])
        expected = self.expected(denoiser, self.labels, torch.full((4,), 10), w[:, None])
        assert_within(
            denoiser.score(self.x, self.t, self.labels, guidance=w), expected, 1e-5 * float(expected.abs().max())
        )

    def test_of_one_is_the_conditional_score(self):
        denoiser = self.denoiser(null_cond=10)
        plain = denoiser.score(self.x, self.t, self.labels)
        assert_within(denoiser.score(self.x, self.t, self.labels, guidance=1.0), plain, 1e-5)

    def test_a_pytree(self):
        cond = {"label": self.labels, "size": torch.randn(4, 2)}
        null = {"label": torch.tensor([10]), "size": torch.zeros(1, 2)}
        denoiser = self.denoiser(null_cond=null)
        expected = self.expected(denoiser, cond, {"label": torch.full((4,), 10)}, 3.0)
        assert_within(denoiser.score(self.x, self.t, cond, guidance=3.0), expected, 1e-5 * float(expected.abs().max()))

    def test_denoise_is_guided_alike(self):
        denoiser = self.denoiser(null_cond=10)
        alpha, sigma = (column(f(self.t), self.x) for f in (Cosine().alpha, Cosine().sigma))
        D = denoiser.denoise(self.x, self.t, self.labels, guidance=2.0)
        score = denoiser.score(self.x, self.t, self.labels, guidance=2.0)
        assert_within((alpha * D - self.x) / sigma**2, score, 1e-3)

    def test_an_empty_batch(self):
        denoiser = self.denoiser(null_cond=10)
        assert denoiser.score(self.x[:0], self.t[:0], self.labels[:0], guidance=2.0).shape == (0, 3)

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
            self.denoiser(null_cond=null).score(self.x, self.t, cond, guidance=2.0)


class TestErrors:
    @pytest.mark.parametrize("name", ["epsilon", "", None, "V"])
    def test_unknown_parametrization(self, name):
        with pytest.raises(ValueError, match="parametrization"):
            Denoiser(nn.Identity(), Cosine(), name)

    @pytest.mark.parametrize(
        ("name", "schedule"),
        [("v", EDM()), ("v", RectifiedFlow()), ("flow", Cosine()), ("flow", EDM()), ("flow", VP(BETAS))],
        ids=str,
    )
    def test_a_parametrization_that_does_not_fit_the_schedule(self, name, schedule):
        with pytest.raises(ValueError, match=naming(name)):
            Denoiser(nn.Identity(), schedule, name)

    @pytest.mark.parametrize("schedule", [Cosine(), RectifiedFlow(), VP(BETAS)], ids=repr)
    def test_edm_on_another_schedule(self, schedule):
        with pytest.raises(ValueError, match="edm"):
            Denoiser(nn.Identity(), schedule, "edm", sigma_data=0.5)

    @pytest.mark.parametrize("sigma_data", [None, 0.0, -1.0, math.nan])
    def test_sigma_data(self, sigma_data):
        with pytest.raises(ValueError, match="sigma_data"):
            Denoiser(nn.Identity(), EDM(), "edm", sigma_data=sigma_data)
        with pytest.raises(ValueError, match="sigma_data"):
            Denoiser(nn.Identity(), EDM(), "eps", sigma_data=0.5)

    @pytest.mark.parametrize("t", [torch.tensor(0.5), torch.tensor([0.5]), torch.rand(2, 1), torch.rand(3)])
    def test_times_of_another_shape(self, t):
        with pytest.raises(ValueError, match="t must have shape"):
            make("v", Cosine())(torch.randn(2, 3), t)

    def test_what_is_no_denoiser(self):
        with pytest.raises(TypeError, match="Denoiser"):
            unwrap(nn.Linear(1, 1))

    def test_same_form(self):
        v = make("v", Cosine())
        assert v.same_form(make("v", Cosine())) and v.same_form(copy.deepcopy(v))
        assert not v.same_form(make("eps", Cosine())) and not v.same_form(make("v", VP(BETAS)))
        other = Denoiser(nn.Identity(), EDM(), "edm", sigma_data=0.4)
        assert not make("edm", EDM()).same_form(other)


class TestGenerator:
    @pytest.mark.parametrize("schedule", [EDM(), Cosine(), RectifiedFlow(), VP(BETAS)], ids=repr)
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

    @pytest.mark.parametrize("t_star", [-1.0, math.nan, math.inf])
    def test_levels_outside_the_domain(self, t_star):
        with pytest.raises(ValueError, match="t must be in"):
            Generator(make("edm", EDM()), t_star)

    @pytest.mark.parametrize("input_scale", [0.0, -1.0, math.nan])
    def test_input_scale(self, input_scale):
        with pytest.raises(ValueError, match="input_scale"):
            Generator(make("edm", EDM()), 1.0, input_scale=input_scale)
