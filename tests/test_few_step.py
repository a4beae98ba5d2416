"""Generators of several calls: rungs, sampler and rollout, and a Gaussian teacher with exact scores."""

import copy
import math

import pytest
import torch
from helpers import assert_all_same, assert_same, assert_within, randomised, seeded
from test_compile import Counting
from test_e_step import denoiser, inputs

from emd_fast import Denoiser, FewStepGenerator, Generator, Noise, OnRung, e_step, fuse, ops
from emd_fast.diffusion.rung import plain
from emd_fast.diffusion.schedules import EDM, Cosine, RectifiedFlow
from emd_fast.em.fake_score_step import fake_score_step
from emd_fast.em.few_step import rollout
from emd_fast.em.m_step import m_step
from emd_fast.teachers import gaussian, gaussian_mixture
from emd_fast.teachers.small_unet import SmallUNet

FORMS = [("edm", EDM(), (2.0, 0.5, 0.2)), ("v", Cosine(), (0.8, 0.5, 0.3)), ("flow", RectifiedFlow(), (1.0, 0.6, 0.2))]


def drawn(calls=3, batch=5, seed=0):
    return list(torch.randn(calls, batch, 3, generator=seeded(seed)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_one_rung_is_the_generator_of_one_step(dtype, scale):
    net, (z,) = denoiser("edm", EDM(), 1).to(dtype), drawn(1)
    one, few = Generator(net, 2.0, input_scale=scale), FewStepGenerator(net, [2.0], scale)
    assert_same(few(z), one(z))
    assert_same(few.sample([z])[0], one(z))
    on_rung = OnRung(torch.zeros_like(z), torch.zeros(5, dtype=torch.int64), None)
    assert_same(few(z, on_rung), one(z))
    assert few.state_dict().keys() == one.state_dict().keys()


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize(("form", "schedule", "times"), FORMS)
def test_the_sampler_is_that_of_the_docs(form, schedule, times, scale):
    net = denoiser(form, schedule, 1)
    found = FewStepGenerator(net, times, scale).sample(drawn())
    wide, x = copy.deepcopy(net).double(), None
    for j, z in enumerate(drawn()):
        t = torch.full((5,), times[j])
        alpha, sigma = schedule.alpha(t)[0], schedule.sigma(t)[0]
        x = wide.denoise((sigma if scale is None else scale) * z.double() if j == 0 else alpha * x + sigma * z, t)
        assert_within(found[j], x, 2e-5 * float(x.detach().abs().max()))
    assert len(found) == 3


def test_samples_on_different_rungs_are_those_of_each_rung_alone():
    generator = FewStepGenerator(denoiser("edm", EDM(), 1), (2.0, 0.5, 0.2))
    z, before, rung = *drawn(2), torch.tensor([2, 0, 1, 1, 0])
    mixed = generator(z, OnRung(before, rung, None))
    for j in range(3):
        alone = generator(z, OnRung(before, torch.full((5,), j), None))
        assert_same(mixed[rung == j], alone[rung == j])
    assert_same(mixed[rung == 0], generator(z)[rung == 0])
    assert not torch.equal(mixed, generator(z))


@pytest.mark.parametrize(
    ("times", "options", "said"),
    [
        ((), {}, "times must have at least one noise level, got none"),
        ((0.5, 2.0), {}, "times must fall from rung to rung, got 0.5, 2"),
        ((2.0, 0.5, 0.5), {}, "times must fall from rung to rung, got 2, 0.5, 0.5"),
        ((2.0, math.nan), {}, r"t must be in \[0, inf\]"),
        ((2.0, -0.5), {}, r"t must be in \[0, inf\] for EDM\(\), got from -0.5 to 2"),
        ((2.0, 0.0), {}, "noise at every rung, got sigma = 0 at 0"),
        ((2.0, 0.5), {"input_scale": 0.0}, "input_scale must be positive, got 0"),
    ],
)
def test_rungs_that_cannot_be_are_refused_in_one_line(times, options, said):
    with pytest.raises(ValueError, match=said) as error:
        FewStepGenerator(denoiser("edm", EDM(), 1), times, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("calls", [0, 4])
def test_more_calls_than_rungs_are_refused(calls):
    generator = FewStepGenerator(denoiser("edm", EDM(), 1), (2.0, 0.5, 0.2))
    with pytest.raises(ValueError, match=rf"calls must be in \[1, 3\], the rungs of this generator, got {calls}"):
        generator.sample(drawn(calls))


def test_a_conversion_of_the_module_leaves_its_times():
    generator = FewStepGenerator(denoiser("edm", EDM(), 1), (1.999, 0.501)).bfloat16()
    t = []
    generator.denoiser.network.register_forward_pre_hook(lambda module, args: t.append(args[1]))
    generator.sample(drawn(2))
    assert [each[0].item() for each in t] == [math.log(level) / 4 for level in (1.999, 0.501)] or torch.equal(
        torch.stack([each[0] for each in t]), torch.tensor([1.999, 0.501]).log() / 4
    )


def test_one_compiled_graph_serves_all_rungs():
    generator, graphs = FewStepGenerator(denoiser("edm", EDM(), 1), (2.0, 0.5, 0.2)), Counting()
    compiled = torch.compile(generator, fullgraph=True, backend=graphs)
    for seed, rung in enumerate(([2, 0, 1, 1, 0], [0] * 5, [2] * 5)):
        z, before = drawn(2, seed=seed)
        cond = OnRung(before, torch.tensor(rung), None)
        assert_same(compiled(z, cond), generator(z, cond))
    assert graphs.graphs == 1
    samples = zip(FewStepGenerator.sample(compiled, drawn()), generator.sample(drawn()), strict=True)
    for found, expected in samples:
        assert_same(found, expected)


@pytest.mark.parametrize("guidance", [None, 1.5])
def test_the_scores_see_the_plain_condition(guidance):
    """The E-step and fake-score step under OnRung are those of a plain generator that holds sample and rung itself."""
    teacher, fake_score = denoiser("v", Cosine(), 2, classes=3, null_cond=0), denoiser("v", Cosine(), 3, classes=3)
    generator = FewStepGenerator(denoiser("v", Cosine(), 1, classes=3), (0.8, 0.5, 0.3))
    z, eps, t = inputs()
    labels, rung, (before,) = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 0, 1, 1, 0]), drawn(1)
    cond = OnRung(before, rung, labels)

    def holding(z, cond):
        return generator(z, OnRung(before, rung, cond))

    settings = {"steps": 2, "gamma_eps": 0.16, "gamma_z": 0.01, "guidance": guidance, "noise": Noise(0)}
    found = e_step(generator, teacher, fake_score, z, eps, t, cond=cond, **settings)
    expected = e_step(holding, teacher, fake_score, z, eps, t, cond=labels, **settings)
    assert_all_same((found.z, found.eps, found.drift), (expected.z, expected.eps, expected.drift))
    assert found.cond is cond and found.drift.any()
    weight = torch.ones(5)
    assert_same(m_step(generator, found, weight), m_step(holding, expected, weight))
    assert_same(
        fake_score_step(generator, fake_score, z, eps, t, cond=cond),
        fake_score_step(holding, fake_score, z, eps, t, cond=labels),
    )
    assert_same(teacher.score(eps, t, cond, guidance), teacher.score(eps, t, labels, guidance))


def by_element(x, t, cond):
    """A network that computes every element alone, so that the batch around a sample cannot round it."""
    return torch.tanh(x * 1.3) + 0.1 * t[:, None] + 0.2 * cond[:, None]


def test_a_rollout_makes_the_samples_of_the_sampler_bit_for_bit():
    generator = FewStepGenerator(Denoiser.from_x0(by_element, EDM()), (2.0, 0.5, 0.2, 0.1))
    noises, cond, rung = drawn(4, 8), torch.arange(8.0), torch.tensor([3, 0, 1, 2, 0, 3, 3, 1])
    samples = generator.sample(noises, cond)
    found = rollout(generator, rung, lambda i: noises[i], cond)
    for sample, j in enumerate(rung.tolist()):
        assert_same(found.before[sample], samples[j - 1][sample] if j else torch.zeros(3))
    assert torch.equal(found.rung, rung) and found.cond is cond
    last = generator(noises[3], found)
    assert_same(last[rung == 3], samples[3][rung == 3])


@pytest.mark.parametrize("batch", [0, 1, 8])
def test_a_rollout_passes_a_sample_once_for_each_rung_before_its_own(batch):
    net, sizes = denoiser("edm", EDM(), 1), []
    generator = FewStepGenerator(net, (2.0, 0.5, 0.2, 0.1))
    generator.register_forward_hook(lambda module, args, output: sizes.append((len(args[0]), output.requires_grad)))
    rung = torch.tensor([3, 0, 1, 2, 0, 1, 3, 1])[:batch]
    found = rollout(generator, rung, lambda i: drawn(4, batch)[i])
    assert sizes == [(n, False) for n in ((rung > i).sum().item() for i in range(3)) if n]
    assert all(p.requires_grad for p in generator.parameters()) and not found.before.requires_grad


SIGMA = torch.tensor([[0.9, -0.3], [-0.3, 0.6]])
SCHEDULES = {  # with t of sigma / alpha
    "edm": (EDM(), float),
    "cosine": (Cosine(), lambda ratio: 2 / math.pi * math.atan(ratio)),
}


class LinearByRung(torch.nn.Module):
    """D(x; t_j) = W_j x."""

    def __init__(self, times, schedule):
        super().__init__()
        self.times = torch.tensor(times)
        alpha, sigma = schedule.alpha(self.times)[:, None, None], schedule.sigma(self.times)[:, None, None]
        # A run starts from the teacher.
        self.W = torch.nn.Parameter(alpha * SIGMA @ torch.linalg.inv(alpha**2 * SIGMA + sigma**2 * torch.eye(2)))

    def forward(self, x, t, cond):
        which = (t[:, None] - self.times).abs().argmin(1)
        return (self.W[which] @ x[:, :, None])[:, :, 0]

    def covariances(self, schedule):
        """Of x_1 .. x_n."""
        alpha, sigma = schedule.alpha(self.times).double(), schedule.sigma(self.times).double()
        found = [torch.zeros(2, 2, dtype=torch.float64)]
        for a, s, W in zip(alpha, sigma, self.W.detach().double(), strict=True):
            found.append(W @ (a**2 * found[-1] + s**2 * torch.eye(2)) @ W.T)
        return found[1:]


def mixture(covariances, schedule):
    """The score of the outputs of all rungs, as a fake score learns it that does not know the rung."""
    rungs = len(covariances)
    return gaussian_mixture([1.0] * rungs, torch.zeros(rungs, 2), covariances, schedule)


class GaussianByRung:
    """D of the rung's own outputs."""

    def __init__(self, covariances, schedule):
        self.covariances, self.schedule = covariances, schedule

    def take_rungs(self, rungs):
        assert rungs == len(self.covariances)

    def __call__(self, x, t, cond, rung):
        alpha, sigma = self.schedule.alpha(t)[:, None, None], self.schedule.sigma(t)[:, None, None]
        C = self.covariances[rung]
        return (alpha * C @ torch.linalg.solve(alpha**2 * C + sigma**2 * torch.eye(2), x[:, :, None]))[:, :, 0]


def by_rung(covariances, schedule):
    made = Denoiser.from_x0(GaussianByRung(covariances.float(), schedule), schedule)
    made.take_rungs(len(covariances))
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ratios", "fake_score_of", "bound"),
    [
        ("edm", (2.0, 0.4), mixture, (0.03, 0.05)),
        ("cosine", (2.0, 0.4), mixture, (0.03, 0.05)),
        ("edm", (2.0, 0.7, 0.25), by_rung, (0.003, 0.003)),
        ("cosine", (2.0, 1.0, 0.5, 0.25), by_rung, (0.003, 0.003)),
    ],
)
def test_training_takes_every_rung_to_a_gaussian_teacher(name, ratios, fake_score_of, bound):
    """Exact scores.

    Where rungs err in opposite directions, the gradient of a mixture falls with the third power of the error: many
    samples help. The bounds are for the last rung and for each.
    """
    schedule, time = SCHEDULES[name]
    times = tuple(map(time, ratios))
    network, rungs = LinearByRung(times, schedule), len(times)
    generator = FewStepGenerator(Denoiser.from_x0(network, schedule), times)
    teacher = gaussian(torch.zeros(2), SIGMA, schedule)
    steps, n, noise = 300, 2048, Noise(0)
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.03, betas=(0.5, 0.9))
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def errors():
        return [float((C - SIGMA).norm() / SIGMA.norm()) for C in network.covariances(schedule)]

    assert min(errors()) > 0.25
    for _ in range(steps):
        fake_score = fake_score_of(torch.stack(network.covariances(schedule)), schedule)
        rung = ops.integers(rungs, (n,), noise, stream=14)
        cond = rollout(generator, rung, lambda i: ops.normal((n, 2), noise, stream=15, substep=i))
        t = schedule.t_from_log_snr(7 * ops.uniform((n,), noise, stream=6) - 1)
        z, eps = ops.normal((n, 2), noise, stream=0), ops.normal((n, 2), noise, stream=1)
        settings = {"steps": 2, "gamma_eps": 0.2, "gamma_z": 0.05, "noise": noise}
        result = e_step(generator, teacher, fake_score, z, eps, t, cond=cond, **settings)
        optimizer.zero_grad()
        m_step(generator, result, result.sigma.square()).mean().backward()
        optimizer.step()
        decay.step()
        noise.advance()
    found = errors()
    assert found[-1] < bound[0] and max(found) < bound[1], found
    # The samples have the covariance that the weights say.
    z = [ops.normal((40_000, 2), Noise(7), stream=9, substep=j) for j in range(rungs)]
    with torch.no_grad():
        drawn_covariance = torch.cov(generator.sample(z)[-1].double().T)
    assert float((drawn_covariance - SIGMA).norm() / SIGMA.norm()) < 0.05


def test_a_fake_score_that_takes_the_rung_is_the_same_before_a_training_and_gets_the_rung():
    def made(seed):
        return Denoiser(randomised(SmallUNet(1, 4, num_classes=3), seed), EDM(), "edm", sigma_data=0.5)

    teacher, fake_score = made(0), made(1)
    z, eps = (torch.randn(5, 1, 4, 4, generator=seeded(seed)) for seed in (0, 1))
    t, labels, rung = torch.linspace(0.3, 1.5, 5), torch.arange(5) % 3, torch.tensor([2, 0, 1, 1, 0])
    cond = OnRung(eps.flip(0), rung, labels)
    before = fake_score(z, t, cond)
    other = denoiser("edm", EDM(), 1)
    for each in (fake_score, other):
        each.take_rungs(3)
    assert fake_score.takes_rung and not other.takes_rung
    assert_same(fake_score(z, t, cond), before)
    torch.nn.init.normal_(fake_score.network.rung_embedding.weight)
    assert not torch.equal(fake_score(z, t, cond), before)
    assert_same(fake_score(z, t, labels), before)
    # So in the E-step: on one rung alone each sample has the same delta.
    generator = FewStepGenerator(made(2), (2.0, 0.5, 0.2))
    settings = {"steps": 2, "gamma_eps": 0.16, "gamma_z": 0.01, "noise": Noise(0)}
    for fused in (False, True):
        if fused:
            for network in (generator, teacher, fake_score):
                fuse(network)
        mixed = e_step(generator, teacher, fake_score, z, eps, t, cond=cond, **settings)
        alone = []
        for j in range(3):

            def on_one(x, t, cond, j=j):
                return fake_score.network(x, t, plain(cond), torch.full((5,), j))

            its = Denoiser(on_one, EDM(), "edm", sigma_data=0.5)
            alone.append(e_step(generator, teacher, its, z, eps, t, cond=cond, **settings))
        for sample, j in enumerate(rung.tolist()):
            torch.testing.assert_close(mixed.drift[sample], alone[j].drift[sample], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(mixed.drift[sample], alone[(j + 1) % 3].drift[sample], rtol=1e-3, atol=1e-3)
