import math

import pytest
import torch
from helpers import (
    DTYPES,
    LAYOUTS,
    NOISE_ERROR,
    assert_as_good_as_eager,
    assert_same,
    column,
    draw,
    dtypes,
    layouts,
    naming,
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


def formula(eps, drift, terms, coefs, alpha, sigma, gamma, n):
    """The formulas of docs/algorithm.md, in the dtypes of the arguments. Returns eps, drift, alpha delta."""
    delta = sum(column(coefs[:, i], eps) * term for i, term in enumerate(terms))
    pull = column(sigma, eps) * delta
    return (
        eps + gamma * (pull - eps) + (2 * gamma) ** 0.5 * n,
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


def check(arguments, step_size, where, substep=0, cotangent_dtype=None):
    """Runs the op in place and compares all three results with float64."""
    a = {name: (value.clone() if name in ("eps", "drift") else value) for name, value in arguments.items()}
    cotangent = ops.langevin_eps(
        *a.values(), step_size=step_size, noise=Noise(**where), substep=substep, cotangent_dtype=cotangent_dtype
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
                gamma if to is None else gamma.to(to), n if to is not None else n.float(),
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
    seed=seeds,
)
def test_against_float64(backend, shape, outputs, with_x, dtype, layout, cotangent_dtype, by_sample, substep, seed):
    g = seeded(seed)
    step_size = per_sample(shape[0], g, 0.0, 1.0) if by_sample else torch.rand((), generator=g).item()
    where = {"seed": seed, "step": 5, "first_sample": 9}
    check(case(shape, g, outputs, with_x, dtype, layout), step_size, where, substep, cotangent_dtype)


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels_last"])
@pytest.mark.parametrize("shape", [(3, 3, 17, 19), (2, 3, 64, 64)])
def test_large_and_strided(backend, shape, layout):
    check(case(shape, seeded(1), 3, True, torch.bfloat16, layout), 0.2, {"seed": 3})


@pytest.mark.parametrize("step_size", [0, 0.0, 1, 1.0, 1e-6])
def test_ends_of_the_step_size(backend, step_size):
    check(case((2, 37), seeded(2)), step_size, {"seed": 4})


def test_mixed_dtypes_of_the_terms(backend):
    arguments = case((3, 41), seeded(3), 3)
    arguments["x"] = arguments["x"].half()
    arguments["outputs"] = [o.to(dtype) for o, dtype in zip(arguments["outputs"], DTYPES, strict=True)]
    check(arguments, 0.3, {"seed": 1})


def test_broadcast_coefficients(backend):
    arguments = case((4, 11), seeded(3), 2, False)
    arguments["coefs"] = arguments["coefs"][:1].expand(4, 2)
    arguments["alpha"] = arguments["alpha"][:1].expand(4)
    check(arguments, torch.tensor([0.3]).expand(4), {"seed": 1})


@pytest.mark.parametrize("shape", [(3,), (3, 1), (5, 3, 16, 16), (2, 7, 13)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outputs", [2, 4])
def test_equal_outputs_give_exactly_nothing(backend, shape, dtype, outputs):
    g = seeded(4)
    eps, drift = draw(shape, g), torch.zeros(shape)
    F = draw(shape, g, dtype, scale=100)
    b = torch.randn(shape[0], generator=g) / 3e-3
    pairs = torch.stack([b, -b] * (outputs // 2), dim=1)
    cotangent = ops.langevin_eps(
        eps, drift, None, [F] + [F.clone() for _ in range(outputs - 1)], pairs, per_sample(shape[0], g),
        per_sample(shape[0], g), step_size=0.16, noise=Noise(0),
    )  # fmt: skip
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


def test_version_counters_notice_the_update(backend):
    arguments = case((3, 5), seeded(5))
    versions = arguments["eps"]._version, arguments["drift"]._version
    ops.langevin_eps(*arguments.values(), step_size=0.1, noise=Noise(0))
    assert arguments["eps"]._version > versions[0] and arguments["drift"]._version > versions[1]


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
    arguments["outputs"] = [o.requires_grad_() for o in arguments["outputs"]]
    arguments["coefs"].requires_grad_()
    cotangent = ops.langevin_eps(*arguments.values(), step_size=0.2, noise=Noise(1))
    assert not cotangent.requires_grad and not arguments["eps"].requires_grad


def test_a_tuple_of_outputs(backend):
    arguments = case((2, 3), seeded(7))
    arguments["outputs"] = tuple(arguments["outputs"])
    ops.langevin_eps(*arguments.values(), step_size=0.2, noise=Noise(1))


def other_memory(**changed):
    """Arguments of a good call, with changes, built anew for every test."""
    return lambda: {
        **case((2, 3), seeded(8)),
        "step_size": 0.1,
        "noise": Noise(0),
        **{k: v() for k, v in changed.items()},
    }


NAN = float("nan")
BAD = {
    "eps bfloat16": ({"eps": lambda: torch.ones(2, 3).bfloat16()}, TypeError, "eps"),
    "eps float64": ({"eps": lambda: torch.ones(2, 3).double()}, TypeError, "eps"),
    "eps not contiguous": ({"eps": lambda: torch.ones(3, 2).T}, ValueError, "eps"),
    "eps list": ({"eps": lambda: [1.0]}, TypeError, "eps"),
    "eps 0-d": ({"eps": lambda: torch.tensor(1.0)}, ValueError, "eps"),
    "eps requires grad": ({"eps": lambda: torch.ones(2, 3, requires_grad=True)}, ValueError, "eps"),
    "drift shape": ({"drift": lambda: torch.ones(2, 4)}, ValueError, "drift"),
    "drift not contiguous": ({"drift": lambda: torch.ones(3, 2).T}, ValueError, "drift"),
    "drift expanded": ({"drift": lambda: torch.ones(1, 3).expand(2, 3)}, ValueError, "drift"),
    "drift half": ({"drift": lambda: torch.ones(2, 3).half()}, TypeError, "drift"),
    "drift meta": ({"drift": lambda: torch.ones(2, 3, device="meta")}, ValueError, "drift"),
    "x shape": ({"x": lambda: torch.ones(2, 1)}, ValueError, "x"),
    "x int": ({"x": lambda: torch.ones(2, 3).int()}, TypeError, "x"),
    "x missing": ({"x": lambda: None}, ValueError, "coefs"),
    "no outputs": ({"outputs": list}, ValueError, "outputs"),
    "five outputs": ({"outputs": lambda: [torch.ones(2, 3)] * 5}, ValueError, "outputs"),
    "one tensor": ({"outputs": lambda: torch.ones(2, 2, 3)}, (TypeError, ValueError), "outputs"),
    "outputs of another type": ({"outputs": lambda: None}, (TypeError, ValueError), "outputs"),
    "output shape": ({"outputs": lambda: [torch.ones(2, 3), torch.ones(3)]}, ValueError, r"outputs\[1\]"),
    "output float64": ({"outputs": lambda: [torch.ones(2, 3).double()] * 2}, TypeError, r"outputs\[0\]"),
    "output meta": (
        {"outputs": lambda: [torch.ones(2, 3), torch.ones(2, 3, device="meta")]},
        ValueError,
        r"outputs\[1\]",
    ),
    "coefs shape": ({"coefs": lambda: torch.ones(2, 2)}, ValueError, "coefs"),
    "coefs half": ({"coefs": lambda: torch.ones(2, 3).half()}, TypeError, "coefs"),
    "coefs NaN": ({"coefs": lambda: torch.full((2, 3), NAN)}, ValueError, "coefs"),
    "alpha shape": ({"alpha": lambda: torch.ones(1)}, ValueError, "alpha"),
    "alpha number": ({"alpha": lambda: 1.0}, TypeError, "alpha"),
    "alpha NaN": ({"alpha": lambda: torch.tensor([1.0, NAN])}, ValueError, "alpha"),
    "sigma zero": ({"sigma": lambda: torch.tensor([1.0, 0.0])}, ValueError, "sigma"),
    "sigma negative": ({"sigma": lambda: torch.tensor([-1.0, 1.0])}, ValueError, "sigma"),
    "sigma NaN": ({"sigma": lambda: torch.tensor([NAN, 1.0])}, ValueError, "sigma"),
    "sigma infinite": ({"sigma": lambda: torch.tensor([math.inf, 1.0])}, ValueError, "sigma"),
    "step size negative": ({"step_size": lambda: -0.1}, ValueError, "step_size"),
    "step size above one": ({"step_size": lambda: 1.1}, ValueError, "step_size"),
    "step size NaN": ({"step_size": lambda: NAN}, ValueError, "step_size"),
    "step size text": ({"step_size": lambda: "0.1"}, TypeError, "step_size"),
    "step size bool": ({"step_size": lambda: True}, TypeError, "step_size"),
    "step sizes shape": ({"step_size": lambda: torch.ones(3)}, ValueError, "step_size"),
    "step sizes 0-d": ({"step_size": lambda: torch.tensor(0.1)}, ValueError, "step_size"),
    "step sizes float64": ({"step_size": lambda: torch.ones(2).double()}, TypeError, "step_size"),
    "step sizes negative": ({"step_size": lambda: torch.tensor([0.1, -0.1])}, ValueError, "step_size"),
    "step sizes NaN": ({"step_size": lambda: torch.tensor([0.1, NAN])}, ValueError, "step_size"),
    "step sizes above one": ({"step_size": lambda: torch.tensor([0.1, 1.01])}, ValueError, "step_size"),
    "noise": ({"noise": lambda: torch.zeros(4).long()}, TypeError, "noise"),
    "noise meta": ({"noise": lambda: Noise(0, device="meta")}, ValueError, "noise"),
    "substep": ({"substep": lambda: 2**16}, ValueError, "substep"),
    "substeps together": ({"substep": lambda: 1, "noise": lambda: Noise(0, substep=65535)}, ValueError, "substep"),
    "cotangent dtype": ({"cotangent_dtype": lambda: torch.float64}, TypeError, "cotangent_dtype"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_nothing_is_written(name):
    changed, error, named = BAD[name]
    given = other_memory(**changed)()
    kept = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(error, match=naming(named)):
        ops.langevin_eps(**given)
    for key, value in kept.items():
        if value.device.type == "cpu":
            assert_same(given[key], value, key)


@pytest.mark.parametrize("other", ["eps and drift", "eps and x", "drift and an output", "eps and alpha"])
def test_overlapping_memory_is_refused(other):
    a = case((2,), seeded(9))
    memory = torch.rand(4) + 0.5
    match other:
        case "eps and drift":
            a["eps"], a["drift"] = memory[:2], memory[1:3]
        case "eps and x":
            a["eps"], a["x"] = memory[:2], memory[:2].flip(0).copy_(memory[:2]).detach()
            a["x"] = memory[1:3]
        case "drift and an output":
            a["drift"] = memory[:2]
            a["outputs"][1] = memory[:1].expand(2)
        case "eps and alpha":
            a["eps"] = a["alpha"] = memory[:2]
    before = memory.clone()
    with pytest.raises(ValueError, match="overlap"):
        ops.langevin_eps(*a.values(), step_size=0.1, noise=Noise(0))
    assert torch.equal(memory, before)


def test_neighbours_in_one_buffer_are_fine(backend):
    a = case((2,), seeded(9))
    memory = torch.zeros(8)
    a["eps"], a["drift"], a["x"] = memory[:2], memory[2:4], memory[4:6]
    ops.langevin_eps(*a.values(), step_size=0.1, noise=Noise(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree_on_drift_and_cotangent_bit_for_bit_where_two_terms_meet(dtype):
    """Two products, each rounded, and one sum leave nothing to the order of the arithmetic in delta."""
    results = []
    for name in ("reference", "auto"):
        a = case((3, 129), seeded(10), 2, False, dtype)
        with emd_fast.use_backend(name):
            results.append(ops.langevin_eps(*a.values(), step_size=0.1, noise=Noise(0)))
    assert_same(results[1], results[0])
