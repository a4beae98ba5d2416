import math

import pytest
import torch
from helpers import (
    DTYPES,
    NOISE_ERROR,
    assert_as_good_as_eager,
    assert_same,
    column,
    draw,
    dtypes,
    integrators,
    laid_out,
    layouts,
    normals,
    per_sample,
    seeded,
    seeds,
    shapes,
)
from hypothesis import given
from hypothesis import strategies as st

import emd_fast
from emd_fast import Noise, ops


def formula(eps, drift, terms, coefs, alpha, sigma, gamma, integrator, n):
    """The formulas of docs/algorithm.md, in the dtypes of the arguments. Returns eps, drift, alpha delta."""
    delta = sum(column(coefs[:, i], eps) * term for i, term in enumerate(terms))
    pull = column(sigma, eps) * delta
    scale = (gamma * (2 - gamma) if integrator == "exact" else 2 * gamma) ** 0.5
    return (
        eps + gamma * (pull - eps) + scale * n,
        (1 - gamma) * drift + gamma * pull,
        column(alpha, eps) * delta,
    )


def case(shape, g, outputs=2, with_x=True, dtype=torch.float32, layout="contiguous"):
    return {
        "eps": draw(shape, g),
        "drift": draw(shape, g),
        "x": draw(shape, g, torch.float32, layout) if with_x else None,
        "outputs": [draw(shape, g, dtype, layout) for _ in range(outputs)],
        "coefs": torch.randn(shape[0], outputs + with_x, generator=g) if shape[0] else torch.empty(0, outputs + with_x),
        "alpha": per_sample(shape[0], g),
        "sigma": per_sample(shape[0], g),
    }


def check(arguments, step_size, where, substep=0, cotangent_dtype=None, integrator="euler"):
    """Runs the op in place and compares all three results with float64."""
    a = {name: (value.clone() if name in ("eps", "drift") else value) for name, value in arguments.items()}
    cotangent = ops.langevin_eps(
        *a.values(),
        step_size=step_size,
        integrator=integrator,
        noise=Noise(**where),
        substep=substep,
        cotangent_dtype=cotangent_dtype,
    )
    n = normals(tuple(a["eps"].shape), stream=2, substep=substep, **where)
    terms = [*([] if a["x"] is None else [a["x"]]), *a["outputs"]]
    cotangent_dtype = cotangent_dtype or a["outputs"][0].dtype
    eps, drift = arguments["eps"], arguments["drift"]
    results = []
    for to in (torch.float64, None):
        wide = [x if to is None else x.to(to) for x in (eps, drift, a["coefs"], a["alpha"], a["sigma"])]
        gamma = column(step_size, eps) if isinstance(step_size, torch.Tensor) else torch.tensor(step_size).float()
        results.append(
            formula(
                wide[0], wide[1], [t if to is None else t.to(to) for t in terms], *wide[2:],
                gamma if to is None else gamma.to(to), integrator, n if to is not None else n.float(),
            )
        )  # fmt: skip
    exact, eager = results
    root = math.sqrt(2 * (step_size.max().item() if isinstance(step_size, torch.Tensor) and len(step_size) else 1))
    assert_as_good_as_eager(a["eps"], exact[0], eager[0], more=root * NOISE_ERROR, what="eps")
    assert_as_good_as_eager(a["drift"], exact[1], eager[1], what="drift")
    assert cotangent.dtype == cotangent_dtype and cotangent.is_contiguous()
    assert_as_good_as_eager(cotangent, exact[2], eager[2].to(cotangent_dtype), what="cotangent")


@given(
    shape=shapes(),
    outputs=st.integers(1, 4),
    with_x=st.booleans(),
    dtype=dtypes,
    layout=layouts,
    cotangent_dtype=st.one_of(st.none(), dtypes),
    by_sample=st.booleans(),
    substep=st.sampled_from([0, 1, 65535]),
    integrator=integrators,
    seed=seeds,
)
def test_against_float64(
    backend, shape, outputs, with_x, dtype, layout, cotangent_dtype, by_sample, substep, integrator, seed
):
    g = seeded(seed)
    step_size = per_sample(shape[0], g, 0.0, 1.0) if by_sample else torch.rand((), generator=g).item()
    where = {"seed": seed, "step": 5, "first_sample": 9}
    check(case(shape, g, outputs, with_x, dtype, layout), step_size, where, substep, cotangent_dtype, integrator)


@pytest.mark.parametrize("step_size", [0, 0.0, 1, 1.0, 1e-6])
def test_ends_of_the_step_size(backend, step_size):
    check(case((2, 37), seeded(2)), step_size, {"seed": 4})


def test_broadcast_coefficients(backend):
    arguments = case((4, 11), seeded(3), 2, False)
    arguments["coefs"] = arguments["coefs"][:1].expand(4, 2)
    arguments["alpha"] = arguments["alpha"][:1].expand(4)
    check(arguments, torch.tensor([0.3]).expand(4), {"seed": 1})


@pytest.mark.parametrize("shape", [(3,), (3, 1), (5, 3, 16, 16), (2, 7, 13)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("with_x", [False, True])
def test_equal_outputs_give_exactly_nothing(backend, shape, dtype, outputs, with_x):
    """In any layout: those of the two that meet are different."""
    g = seeded(4)
    eps, drift, v, F = draw(shape, g), torch.zeros(shape), per_sample(shape[0], g), draw(shape, g, dtype, scale=100)
    terms = [laid_out(F, ["contiguous", "channels_last"][i % 2]).clone() for i in range(outputs)]
    b, zero = torch.randn(shape[0], generator=g) / 3e-3, torch.zeros(shape[0])
    x, coefs = (F, [zero, b, -b, *[zero] * (outputs - 2)]) if with_x else (None, [b, -b] * (outputs // 2))
    coefs = torch.stack(coefs, dim=1)
    cotangent = ops.langevin_eps(eps, drift, x, terms, coefs, v, v, step_size=0.16, noise=Noise(0))
    assert not drift.any() and not cotangent.any()


def test_only_eps_and_drift_are_written_in_place(backend):
    arguments = case((3, 5), seeded(5))
    kept = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    outputs = [o.clone() for o in arguments["outputs"]]
    noise, step_size = Noise(3, step=1), torch.full((3,), 0.1)
    pointers = arguments["eps"].data_ptr(), arguments["drift"].data_ptr()
    ops.langevin_eps(*arguments.values(), step_size=step_size, noise=noise)
    assert pointers == (arguments["eps"].data_ptr(), arguments["drift"].data_ptr())
    for name in ("x", "coefs", "alpha", "sigma"):
        assert_same(arguments[name], kept[name], name)
    for now, before in zip(arguments["outputs"], outputs, strict=True):
        assert_same(now, before)
    assert noise.state.tolist() == [3, 1, 0, 0] and bool((step_size == 0.1).all())
    assert not torch.equal(arguments["eps"], kept["eps"])
    assert min(arguments["eps"]._version, arguments["drift"]._version) > 0


def test_a_split_batch_is_the_whole(backend):
    whole = case((5, 3, 7), seeded(6))
    parts = [
        {n: [o[s].clone() for o in v] if n == "outputs" else v[s].clone() for n, v in whole.items()}
        for s in (slice(0, 2), slice(2, 5))
    ]
    result = ops.langevin_eps(*whole.values(), step_size=0.2, noise=Noise(1, first_sample=10), substep=3)
    pieces = [
        ops.langevin_eps(*part.values(), step_size=0.2, noise=Noise(1, first_sample=first), substep=3)
        for part, first in zip(parts, (10, 12), strict=True)
    ]
    assert torch.equal(torch.cat(pieces), result)
    for name in ("eps", "drift"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])


def test_outputs_that_require_gradients_are_read_without(backend):
    arguments = case((2, 3), seeded(7))
    arguments["outputs"] = tuple(o.requires_grad_() for o in arguments["outputs"])
    arguments["coefs"].requires_grad_()
    cotangent = ops.langevin_eps(*arguments.values(), step_size=0.2, noise=Noise(1))
    assert not cotangent.requires_grad and not arguments["eps"].requires_grad


def test_neighbours_in_one_buffer_are_fine(backend):
    a = case((2,), seeded(9))
    memory = torch.zeros(8)
    a["eps"], a["drift"], a["x"] = memory[:2], memory[2:4], memory[4:6]
    ops.langevin_eps(*a.values(), step_size=0.1, noise=Noise(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree_on_drift_and_cotangent_bit_for_bit_where_two_terms_meet(backend, dtype):
    """Two products, each rounded, and one sum leave nothing to the order of the arithmetic in delta."""
    results = []
    for name in ("reference", backend):
        a = case((3, 3, 9, 8), seeded(10), 2, False, dtype, "channels_last")
        with emd_fast.use_backend(name):
            results.append((ops.langevin_eps(*a.values(), step_size=0.1, noise=Noise(0)), a["drift"]))
    for ours, expected in zip(*results, strict=True):
        assert_same(ours, expected)


@pytest.mark.parametrize("op", ["langevin_eps", "langevin_z"])
@pytest.mark.parametrize("step_size", [1e-3, 0.02, 0.16, 0.36, 0.9])
def test_the_exact_integrator_leaves_the_prior_stationary(backend, op, step_size):
    """state = decay state + scale n is stationary at a variance of scale^2 / (1 - decay^2)."""

    def step(state, integrator):
        options = {"step_size": step_size, "integrator": integrator, "noise": Noise(3)}
        if op == "langevin_z":
            ops.langevin_z(state, torch.zeros_like(state), **options)
            return
        ones, output = torch.ones(len(state)), torch.randn_like(state)
        coefs = torch.tensor([[1.0, -1.0]]).repeat(len(state), 1)
        ops.langevin_eps(state, torch.zeros_like(state), None, [output, output], coefs, ones, ones, **options)

    n = normals((2, 64), seed=3, step=0, first_sample=0, stream=2 if op == "langevin_eps" else 3, substep=0)
    for integrator, variance in (("exact", 1.0), ("euler", 1 / (1 - step_size / 2))):
        from_one, from_zero = torch.ones(2, 64), torch.zeros(2, 64)
        step(from_one, integrator)
        step(from_zero, integrator)
        scale = (from_zero.double() * n).sum() / n.square().sum()
        decay = (from_one.double() - from_zero.double()).mean()
        assert scale**2 / (1 - decay**2) == pytest.approx(variance, rel=2e-3)
