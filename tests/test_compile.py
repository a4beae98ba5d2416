"""Every op under torch.compile, and as torch.library sees it."""

import contextlib
import functools
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_all_same, assert_same, assert_within
from torch.library import opcheck
from torch.utils._pytree import tree_leaves as leaves

import emd_fast
from emd_fast import Noise, backends, ops

X, ONE = torch.randn(4, 6, 3), torch.rand(4) + 0.5
# What functions below close over. Not X, which they are given: torch 2.13 then keeps the graph where the two are one.
Y = torch.randn(4, 6, 3)


def langevin(noise, substep, step_size=0.1, x=X):
    eps, drift = X.clone(), 1 - X
    coefs = torch.ones(4, 2 + (x is not None))
    out = ops.langevin_eps(
        eps, drift, x, [X, 2 * X], coefs, ONE, ONE, step_size=step_size, noise=noise, substep=substep,
        cotangent_dtype=torch.bfloat16,
    )  # fmt: skip
    return eps, drift, out


def langevin_z(noise, substep):
    z = X.clone()
    ops.langevin_z(z, 1 - X, step_size=ONE / 10, noise=noise, substep=substep)
    return z


DRAWING = {
    "uniform": lambda noise, substep: ops.uniform((4, 7), noise, stream=1, substep=substep),
    "normal": lambda noise, substep: ops.normal((4, 7), noise, stream=1, substep=substep, dtype=torch.bfloat16),
    "integers": lambda noise, substep: ops.integers(10, (4, 7), noise, stream=1, substep=substep),
    "perturb": lambda noise, substep: ops.perturb(X, ONE, ONE, noise=noise, stream=1, substep=substep),
    "langevin_eps": langevin,
    "langevin_eps without x": lambda noise, substep: langevin(noise, substep, ONE / 10, None),
    "langevin_z": langevin_z,
}


def gradient(loss):
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x)
    return grad


def attention(x, backend=None):
    return ops.attention(x[:, :, None], 2 * x[:, :, None], x[:, :, None], backend=backend)


BY_CHANNEL = {"add": Y[..., 0], "scale": Y[..., 1], "activation": "silu"}
OTHERS = {
    "perturb": lambda x: ops.perturb(x, ONE, ONE, eps=Y),
    "m_step_loss": lambda x: ops.m_step_loss(x, Y, ONE, ONE, ONE),
    "score_matching_loss": lambda x: ops.score_matching_loss(x, Y, 1 - Y, ONE, ONE, ONE),
    "group_norm": lambda x: ops.group_norm(x, 3, ONE.new_ones(6), None, **BY_CHANNEL),
    "residual": lambda x: ops.residual(x, Y, ONE.new_ones(6), Y[0, :, 0], scale=0.5),
    "geglu": lambda x: ops.geglu(x.transpose(1, 2)),
    "attention": attention,
    "attention, reference": lambda x: attention(x, "reference"),
}


class Counting:
    """A backend of torch.compile that counts the graphs it is given."""

    def __init__(self, inner="aot_eager"):
        self.graphs = 0
        self.inner = torch._dynamo.lookup_backend(inner)

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return self.inner(graph, example_inputs)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", DRAWING)
def test_no_recompilation_from_substep_to_substep(name):
    """The first number is a constant, the second makes it a symbol: after that, one graph for all."""
    counting = Counting()
    compiled = torch.compile(DRAWING[name], fullgraph=True, backend=counting)
    noise, graphs = Noise(1), []
    for substep in range(6):
        noise.advance()
        assert_all_same(leaves(compiled(noise, substep)), leaves(DRAWING[name](noise, substep)))
        graphs.append(counting.graphs)
    assert graphs[1] <= 2 and graphs[-1] == graphs[1], graphs


@pytest.mark.parametrize("name", ["uniform", "normal", "integers"])
def test_dynamic_batches(name):
    counting = Counting()
    op = functools.partial(ops.integers, 10) if name == "integers" else getattr(ops, name)
    run = lambda x, noise: op(x.shape, noise, stream=1)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=counting, dynamic=True)
    for batch in (2, 3, 5, 9):
        given = torch.empty(batch, 7), Noise(1, first_sample=batch)
        assert_same(compiled(*given), run(*given))
    assert counting.graphs == 1


@pytest.mark.parametrize("name", OTHERS)
def test_value_and_gradient_in_one_graph(name):
    weights = torch.randn(OTHERS[name](X).shape)
    counting = Counting()
    compiled = torch.compile(OTHERS[name], fullgraph=True, backend=counting)
    for _ in range(2):
        assert_within(compiled(X), OTHERS[name](X), 1e-6)
        mine = gradient(lambda x: (compiled(x) * weights).sum())
        assert_within(mine, gradient(lambda x: (OTHERS[name](x) * weights).sum()), 1e-5)
    assert counting.graphs == 2  # with and without a gradient


@pytest.mark.parametrize("inside", [True, False])
def test_use_backend_is_respected_in_compiled_code(monkeypatch, inside):
    used = []
    original = backends.implementation
    monkeypatch.setattr(backends, "implementation", lambda op, b, d: used.append((op, b)) or original(op, b, d))

    def loss(x, name):
        with emd_fast.use_backend(name) if name else contextlib.nullcontext():
            return ops.m_step_loss(x, Y, ONE, ONE, ONE).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for name in ("reference", "auto", "reference"):
        used.clear()
        with emd_fast.use_backend("auto" if inside else name):
            y = compiled(x := X.clone().requires_grad_(), name if inside else None)
        y.backward()
        assert used == [("m_step_loss", name), ("m_step_loss_backward", name)], (name, used)
        assert x.grad is not None
        assert backends.active() == "auto"


def test_use_backend_is_respected_where_nobody_had_used_it_before():
    def run():
        compiled = torch.compile(lambda x: x + len(backends.active()), fullgraph=True, backend="eager")
        first = compiled(torch.zeros(())).item()
        with emd_fast.use_backend("reference"):
            return first, compiled(torch.zeros(())).item()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run).result() == (len("auto"), len("reference"))


def test_a_whole_chain_in_one_graph():
    def chain(eps, drift, z, noise):
        for k in range(3):
            x = ops.perturb(z, ONE, ONE, eps=eps)
            coefs = ONE[:, None].expand(4, 2)
            now = {"noise": noise, "substep": k}
            cotangent = ops.langevin_eps(eps, drift, x, [torch.tanh(x)], coefs, ONE, ONE, step_size=0.1, **now)
            ops.langevin_z(z, cotangent, step_size=0.05, **now)
        return eps * 1, drift * 1, z * 1

    results = []
    for run in (chain, torch.compile(chain, fullgraph=True, backend="aot_eager")):
        tensors = [X.clone() for _ in range(3)]
        results.append([*run(*tensors, Noise(2)), *tensors])
    for mine, exact in zip(*results, strict=True):
        assert_within(mine, exact, 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_everything_under_inductor():
    def everything(x, noise, substep):
        values = [run(x) for run in OTHERS.values()]
        return [run(noise, substep) for run in DRAWING.values()], values, sum(v.square().mean() for v in values)

    compiled = torch.compile(everything, fullgraph=True)
    for substep in (0, 3):
        results = []
        for run in (compiled, everything):
            x = X.clone().requires_grad_()
            drawn, values, loss = run(x, Noise(3), substep)
            loss.backward()
            results.append([*leaves(drawn), *values, x.grad])
        for mine, exact in zip(*results, strict=True):
            assert_within(mine, exact, 1e-5)


NOISE = Noise(3, step=1, first_sample=2, substep=1).state


def samples():
    """Arguments of every op as torch.library has them."""
    eps, drift = X.clone(), 1 - X
    x = X.clone().requires_grad_()
    weight, bias, vectors = torch.randn(6), torch.randn(6), torch.randn(4, 6)
    last = torch.randn(4, 6, 3, 2).contiguous(memory_format=torch.channels_last)
    three = torch.rand(4, 3)
    half = X.bfloat16()
    for b in ("reference", "auto"):
        yield "uniform", ([4, 7], NOISE, 1, 2, b)
        yield "normal", ([4, 7], NOISE, 1, 2, torch.float16, b)
        yield "integers", (10, [4, 7], NOISE, 1, 2, b)
        yield "perturb", (x, ONE, ONE, X, None, 0, 0, torch.float32, b)
        yield "perturb", (half, ONE, ONE, None, NOISE, 5, 1, torch.bfloat16, b)
        yield "langevin_eps", (eps, drift, X, [half, X], three, ONE, ONE, 0.1, None, False, NOISE, 3, torch.bfloat16, b)
        yield (
            "langevin_eps",
            (eps, drift, None, [X], ONE[:, None], ONE, ONE, 0.0, ONE / 9, True, NOISE, 3, torch.float32, b),
        )
        yield "langevin_z", (eps, half, 0.1, None, False, NOISE, 3, b)
        yield "langevin_z", (eps, drift, 0.0, ONE / 9, True, NOISE, 3, b)
        yield "m_step_loss", (x, drift, ONE, ONE, ONE, b)
        yield "m_step_loss_backward", (ONE, drift, ONE, ONE, ONE, torch.bfloat16, b)
        yield "score_matching_loss", (x, X, half, ONE, ONE, ONE, b)
        yield "score_matching_loss_backward", (ONE, half, X, X, ONE, ONE, ONE, b)
        yield "group_norm", (x, 3, weight.clone().requires_grad_(), bias, 1e-5, vectors, vectors, vectors, True, b)
        yield "group_norm", (last, 2, None, None, 1e-5, None, None, None, False, b)
        yield "residual", (x, half, weight.clone().requires_grad_(), bias, 0.5, b)
        yield "residual", (last, last.contiguous(), None, None, 1.0, b)
        yield "geglu", (weight.clone().requires_grad_(), b)
        yield "geglu", (half.transpose(1, 2), b)
        yield "geglu_backward", (weight[:3].clone().requires_grad_(), bias.clone().requires_grad_(), b)
        yield "geglu_backward", (half[:, :3, 0], half[:, :, 1], b)
        q, k = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8, dtype=torch.bfloat16)
        yield "attention", (q.requires_grad_(), q.detach() + 1, q, 0.3, b)
        yield "attention", (k[:, :4], k, k, -0.3, b)
        top = torch.randn(2, 3, 5)
        yield "attention_backward", (X.new_ones(q.shape), *[q.detach()] * 4, top, top, 0.3, [True, False, True], b)
        mean, rstd = torch.randn(4, 2), torch.rand(4, 2)
        asked = [True, True, False, True, False, False]
        rest = (2, weight, None, vectors, None, None, True, asked, b)
        yield "group_norm_backward", (last, last, mean, rstd, *rest)


@pytest.mark.parametrize("name", backends.reference.OPS)
def test_opcheck(name):
    found = [arguments for op, arguments in samples() if op == name]
    assert found
    for arguments in found:
        opcheck(getattr(torch.ops.emd_fast, name).default, arguments)
