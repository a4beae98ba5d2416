"""The E-step against a plain float64 re-implementation of docs/algorithm.md, and what it must leave alone."""

import copy
import functools
import math

import pytest
import torch
from helpers import (
    Mlp,
    assert_all_same,
    assert_as_good_as_eager,
    assert_same,
    assert_within,
    column,
    e_step_xz,
    naming,
    normals,
    seeded,
)
from kernel_cases import doubled
from torch import nn

import emd_fast
from emd_fast import Denoiser, Generator, Noise, e_step
from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow

BETAS = torch.linspace(1e-4, 0.02, 1000)
PAIRS = [  # teacher and fake score, of one parametrization and of two
    ("eps", "eps", VP(BETAS)), ("v", "v", Cosine()), ("v", "x0", Cosine()), ("flow", "eps", RectifiedFlow()),
    ("edm", "edm", EDM()), ("edm", "x0", EDM()),
]  # fmt: skip


def denoiser(parametrization, schedule, seed, classes=0, **options):
    sigma_data = {"sigma_data": 0.5} if parametrization == "edm" else {}
    return Denoiser(Mlp(seed=seed, classes=classes), schedule, parametrization, **sigma_data, **options)


def networks(teacher="v", fake_score="v", schedule=None, classes=0, **options):
    """Generator, teacher and fake score, all different."""
    schedule = schedule or Cosine()
    t_star = float(schedule.t_from_log_snr(torch.tensor([-1.0])))
    generator = Generator(denoiser(teacher, schedule, 1, classes), t_star)
    return generator, denoiser(teacher, schedule, 2, classes, **options), denoiser(fake_score, schedule, 3, classes)


def inputs(batch=5, seed=0, schedule=None):
    g = seeded(seed)
    t = (schedule or Cosine()).t_from_log_snr(4 * torch.rand(batch, generator=g) - 2)
    return torch.randn(batch, 3, generator=g), torch.randn(batch, 3, generator=g), t


def plainly(nets, z, eps, t, draw, *, steps, gamma_eps, gamma_z, cond=None, null=None, guidance=None):
    """Section 1, line by line, in the dtype of z; draw(stream, k) gives the noise."""
    (generator, teacher, fake_score), drift = nets, torch.zeros_like(eps)
    alpha, sigma = (column(f(t.float()).to(z.dtype), z) for f in (teacher.schedule.alpha, teacher.schedule.sigma))
    gamma_eps, gamma_z, w = (column(g, z) if isinstance(g, torch.Tensor) else g for g in (gamma_eps, gamma_z, guidance))
    for k in range(steps):
        latent = z.detach().requires_grad_()
        g = generator(latent, cond)
        x = (alpha * g + sigma * eps).detach()
        with torch.no_grad():
            F = teacher(x, t, cond)
            if w is not None:
                F_u = teacher(x, t, null)
                F = F_u + w * (F - F_u)
            a, b = (column(c.to(z.dtype), z) for c in teacher.score_coefficients(t))
            s_teacher = a * x + b * F
            a, b = (column(c.to(z.dtype), z) for c in fake_score.score_coefficients(t))
            delta = s_teacher - (a * x + b * fake_score(x, t, cond))
        (z_grad,) = torch.autograd.grad(g, latent, alpha * delta)
        drift = (1 - gamma_eps) * drift + gamma_eps * sigma * delta
        eps = eps + gamma_eps * (sigma * delta - eps) + (2 * gamma_eps) ** 0.5 * draw(2, k)
        z = z + gamma_z * (z_grad - z) + (2 * gamma_z) ** 0.5 * draw(3, k)
    return z, eps, drift


def check_against_float64(run, nets, z, eps, t, where, **options):
    result = run(*nets, z, eps, t, noise=Noise(**where), **{k: v for k, v in options.items() if k != "null"})
    offset = where.pop("substep", 0)

    def drawn(stream, k):
        return normals(tuple(z.shape), stream=stream, substep=k + offset, **where)

    wide = [copy.deepcopy(net).double() for net in nets]
    exact = plainly(wide, z.double(), eps.double(), t, drawn, **{k: doubled(v) for k, v in options.items()})
    eager = plainly(nets, z.float(), eps.float(), t, lambda *at: drawn(*at).float(), **options)
    for what, truth, its in zip(("z", "eps", "drift"), exact, eager, strict=True):
        mine = getattr(result, what)
        assert mine.dtype == torch.float32 and mine.is_contiguous()
        # The contract's error of a normal number, a few times over in a chain of some steps.
        assert_as_good_as_eager(mine, truth, its, more=3e-5, what=what)
    return result


@pytest.mark.parametrize(("teacher", "fake_score", "schedule"), PAIRS, ids=str)
@pytest.mark.parametrize("gamma_z", [0.0, 0.03])
def test_against_float64(backend, teacher, fake_score, schedule, gamma_z):
    z, eps, t = inputs(schedule=schedule)
    nets = networks(teacher, fake_score, schedule)
    where = {"seed": 3, "step": 7, "first_sample": 11, "substep": 9}
    result = check_against_float64(e_step, nets, z, eps, t, where, steps=4, gamma_eps=0.16, gamma_z=gamma_z)
    assert_all_same((result.alpha, result.sigma, result.t), (schedule.alpha(t), schedule.sigma(t), t))


def test_step_sizes_and_guidance_by_sample(backend):
    (z, eps, t), labels, g = inputs(), torch.arange(5), seeded(1)
    sizes = {"gamma_eps": 0.05 + 0.5 * torch.rand(5, generator=g), "gamma_z": 0.05 * torch.rand(5, generator=g)}
    for guidance in (None, 2.0, torch.tensor([0.0, 1.0, 2.0, 3.0, 7.0])):
        check_against_float64(
            e_step, networks(classes=6, null_cond=5), z, eps, t, {"seed": 1}, steps=3, cond=labels,
            null=torch.full((5,), 5), guidance=guidance, **sizes,
        )  # fmt: skip


def test_a_pytree_and_a_null_condition_of_the_call(backend):
    z, eps, t = inputs()
    cond = {"label": torch.tensor([0, 1, 2, 3, 4]), "extra": (torch.randn(5, 2),)}
    null = {"label": torch.full((5,), 5), "extra": (torch.zeros(5, 2),)}
    nets = networks(classes=6)
    options = {"steps": 2, "gamma_eps": 0.1, "gamma_z": 0.01, "cond": cond, "guidance": 3.0}
    given = e_step(*nets, z, eps, t, noise=Noise(0), null_cond=null, **options)
    one = {"label": torch.tensor([5]), "extra": (torch.zeros(1, 2),)}
    assert_same(e_step(*nets, z, eps, t, noise=Noise(0), null_cond=one, **options).z, given.z)
    assert given.cond is cond
    run = functools.partial(e_step, null_cond=null)
    assert_same(check_against_float64(run, nets, z, eps, t, {"seed": 0}, null=null, **options).z, given.z)


def test_a_split_batch_is_the_whole(backend):
    z, eps, t = inputs()
    nets, options = networks(), {"steps": 3, "gamma_eps": 0.1, "gamma_z": 0.02}
    whole = e_step(*nets, z, eps, t, noise=Noise(0, first_sample=4), **options)
    parts = [
        e_step(*nets, z[s], eps[s], t[s], noise=Noise(0, first_sample=4 + s.start), **options)
        for s in (slice(0, 2), slice(2, 5))
    ]
    for what in ("z", "eps", "drift"):  # the networks' own matrix products may differ in the last bit with the batch
        assert_within(torch.cat([getattr(p, what) for p in parts]), getattr(whole, what), 1e-5, what)


def test_an_empty_batch(backend):
    z, eps, t = inputs()
    result = e_step(*networks(), z[:0], eps[:0], t[:0], steps=2, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    assert result.z.shape == (0, 3) and result.drift.shape == (0, 3)
    labels = torch.zeros(0, dtype=torch.int64)
    nets = networks(classes=6, null_cond=5)
    e_step(*nets, z[:0], eps[:0], t[:0], cond=labels, guidance=2.0, steps=1, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))


def test_nothing_that_is_given_changes(backend):
    given, nets = inputs(), networks()
    parameters = [p for net in nets for p in net.parameters()]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 7.0)
    parameters[0].requires_grad_(False)
    before = [(value.detach().clone(), value.requires_grad) for value in (*given, *parameters)]
    result = e_step(*nets, *given, steps=3, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    for value, (was, flag) in zip((*given, *parameters), before, strict=True):
        assert_same(value, was)
        assert value.requires_grad == flag
    assert all(bool((p.grad == 7).all()) for p in parameters)
    assert not any(value.requires_grad for value in (result.z, result.eps, result.drift))


def test_neither_layout_dtype_nor_grad_mode_matters(backend):
    z, eps, t = inputs()
    options = {"steps": 2, "gamma_eps": 0.1, "gamma_z": 0.1}

    def run(z, eps):
        return e_step(*networks(), z, eps, t, noise=Noise(0), **options).z

    expected, strided = run(z, eps), torch.stack([z, eps], dim=2)
    assert_same(run(strided[..., 0], strided[..., 1]), expected)
    assert_same(run(z.double(), eps.double()), expected)
    assert_same(run(z.requires_grad_(), eps.requires_grad_()), expected)
    assert z.grad is None and not expected.requires_grad
    with torch.no_grad():
        assert_same(run(z, eps), expected)


def test_reduced_precision_networks(backend):
    z, eps, t = inputs()
    result, expected = (
        e_step(*nets, z, eps, t, steps=2, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
        for nets in ([net.bfloat16() for net in networks()], networks())
    )
    assert result.z.dtype == torch.float32
    assert_within(result.drift, expected.drift, 0.1)  # 8 bits: a coarse agreement


@pytest.mark.parametrize("run", [e_step, e_step_xz])
@pytest.mark.parametrize("after", [0, 1])
def test_flags_are_restored_after_an_exception(run, after):
    nets, left = networks(), iter(range(after))
    nets[0].register_forward_pre_hook(lambda *_: None if next(left, None) is not None else {}["broken"])
    nets[0].denoiser.network.first.bias.requires_grad_(False)
    asked = [p.requires_grad for p in nets[0].parameters()]
    with pytest.raises(KeyError):
        run(*nets, *inputs(), steps=3, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    assert [p.requires_grad for p in nets[0].parameters()] == asked


def test_a_latent_of_another_shape_than_the_image(backend):
    g = seeded(3)
    matrix, eps, t = torch.randn(2, 3, generator=g), torch.randn(4, 3, generator=g), torch.full((4,), 0.5)
    _, teacher, fake_score = networks()
    z = torch.randn(4, 2, generator=g)
    result = e_step(
        lambda z, cond: z @ matrix, teacher, fake_score, z, eps, t, steps=1, gamma_eps=0.1, gamma_z=0.04, noise=Noise(6)
    )
    x = column(teacher.schedule.alpha(t), eps) * (z @ matrix) + column(teacher.schedule.sigma(t), eps) * eps
    delta = teacher.score(x, t) - fake_score.score(x, t)
    z_grad = column(teacher.schedule.alpha(t), eps) * delta @ matrix.T
    expected = z + 0.04 * (z_grad - z) + math.sqrt(0.08) * normals((4, 2), seed=6, stream=3)
    assert_within(result.z, expected, 1e-4)


NAN, LABELS, META = float("nan"), torch.tensor([0, 1]), torch.ones(2, device="meta")
GUIDED = {"cond": LABELS}
# Argument, error, what the message names, values; and what is given besides.
BAD = [
    ("z", TypeError, "z", [torch.ones(2, 3).long(), 1.0]),
    ("z", ValueError, "z", [torch.tensor(1.0)]),
    ("eps", ValueError, "eps", [torch.ones(3, 3), torch.tensor(1.0), torch.ones(2, 3, device="meta")]),
    ("t", ValueError, "t", [torch.tensor([0.5]), torch.full((2, 1), 0.5), torch.tensor([0.5, NAN]), META]),
    ("t", ValueError, "t", [torch.tensor([0.5, 1.5])]),
    ("t", TypeError, "t", [torch.tensor([0.5, 0.5]).double(), 0.5]),
    ("t", ValueError, "sigma", [torch.tensor([0.5, 0.0])]),
    ("steps", ValueError, "steps", [0, -1]),
    ("steps", TypeError, "steps", [2.0, True]),
    ("gamma_eps", ValueError, "gamma_eps", [0.0, 1.0, NAN, torch.ones(3) / 2, META]),
    ("gamma_eps", ValueError, "gamma_eps", [torch.tensor([0.1, 0.0]), torch.tensor([0.1, NAN])]),
    ("gamma_eps", TypeError, "gamma_eps", ["0.1", None, torch.ones(2).double() / 2]),
    ("gamma_z", ValueError, "gamma_z", [-0.1, 1, torch.tensor([0.1, 1.0])]),
    ("gamma_z", TypeError, "gamma_z", [torch.zeros(2).double()]),
    ("guidance", ValueError, "guidance", [NAN, torch.ones(3)], GUIDED),
    ("guidance", TypeError, "guidance", ["2", torch.ones(2).double()], GUIDED),
    ("guidance", ValueError, "null", [2.0], GUIDED),
    ("guidance", ValueError, "cond", [2.0], {"null_cond": 3}),
    ("guidance", ValueError, "null_cond", [2.0], {**GUIDED, "null_cond": {"a": LABELS}}),
    ("cond", ValueError, "cond", [torch.zeros(3, dtype=torch.int64)]),
    ("noise", TypeError, "noise", [3]),
    ("noise", ValueError, "noise", [Noise(0, device="meta")]),
    ("noise", ValueError, "substep", [Noise(0, substep=2**16 - 1)]),
    ("teacher", TypeError, "Denoiser", [nn.Linear(1, 1)]),
    ("fake_score", TypeError, "Denoiser", [lambda x, t, c: x]),
    ("fake_score", ValueError, "schedule", [denoiser("eps", VP(BETAS), 3)]),
]


@pytest.mark.parametrize("run", [e_step, e_step_xz])
@pytest.mark.parametrize(
    ("changed", "error", "named"),
    [({name: v, **dict(*more)}, error, named) for name, error, named, values, *more in BAD for v in values],
)
def test_bad_input_raises_before_anything_is_computed(run, changed, error, named):
    z, eps, t = inputs(2)
    calls, nets = [], dict(zip(("generator", "teacher", "fake_score"), networks(), strict=True))
    for net in nets.values():
        net.register_forward_pre_hook(lambda *a: calls.append(a))
    given = {"z": z, "eps": eps, "t": t, "steps": 2, "gamma_eps": 0.1, "gamma_z": 0.1, "noise": Noise(0)}
    with pytest.raises(error, match=naming(named)):
        run(**{**nets, **given, **changed})
    assert not calls


def test_a_generator_of_another_shape_is_named():
    z, eps, t = inputs()
    _, teacher, fake_score = networks()
    given = lambda z, cond: z[:, :2], teacher, fake_score, z, eps, t
    with pytest.raises(ValueError, match=r"eps must have shape \(5, 2\)"):
        e_step(*given, steps=1, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))


def test_the_chosen_backend_serves_the_whole_step(monkeypatch, backend):
    used = set()
    original = emd_fast.backends.implementation
    monkeypatch.setattr(emd_fast.backends, "implementation", lambda op, b, d: used.add((op, b)) or original(op, b, d))
    z, eps, t = inputs()
    e_step(*networks(), z, eps, t, steps=1, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    assert used == {("perturb", backend), ("langevin_eps", backend), ("langevin_z", backend)}
