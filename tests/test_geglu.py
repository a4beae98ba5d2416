"""geglu: values * gelu(gates), against float64; its first and second derivative."""

import conftest
import pytest
import torch
from helpers import assert_as_good_as_eager, assert_same, draw, dtypes, layouts, seeded, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import gelu

import emd_fast
from emd_fast import ops
from emd_fast.backends import reference

# No compiled kernel has this op.
chosen = pytest.mark.parametrize("chosen", ["triton"] if conftest.INTERPRETED else ["reference", "auto"])
sizes = st.sampled_from([1, 2, 3, 5, 8, 17])
shapes = st.tuples(st.sampled_from([0, 1, 2, 5]), st.lists(sizes, max_size=2), sizes).map(
    lambda s: (s[0], *s[1], 2 * s[2])
)


def formula(packed):
    values, gates = packed.chunk(2, dim=-1)
    return values * gelu(gates)


@chosen
@given(shapes, dtypes, layouts, st.sampled_from([1.0, 6.0]), seeds)
def test_value_and_gradient(chosen, shape, dtype, layout, scale, seed):
    g = seeded(seed)
    packed = draw(shape, g, dtype, layout, scale)
    cotangent = draw((*shape[:-1], shape[-1] // 2), g, dtype, layout)
    results = []
    for run, x, grad in (
        (formula, packed.double(), cotangent.double()),
        (formula, packed, cotangent),
        (ops.geglu, packed, cotangent),
    ):
        x = x.detach().requires_grad_()
        with emd_fast.use_backend(chosen):
            y = run(x)
        results.append((y, *torch.autograd.grad(y, x, grad)))
    for what, exact, eager, mine in zip(("value", "gradient"), *results, strict=True):
        assert mine.dtype == dtype and mine.is_contiguous()
        assert_as_good_as_eager(mine, exact, eager, what=what)


@pytest.mark.parametrize("name", ["geglu", "geglu_backward"])
def test_derivatives_of_the_reference_in_float64(name):
    g = seeded(0)
    packed, grad = (draw(shape, g).double().requires_grad_() for shape in ((3, 8), (3, 4)))
    op = getattr(torch.ops.emd_fast, name).default
    inputs = (packed,) if name == "geglu" else (grad, packed)
    assert torch.autograd.gradcheck(lambda *x: op(*x, "reference"), inputs)
    if name == "geglu":
        assert torch.autograd.gradgradcheck(lambda *x: op(*x, "reference"), inputs)
        assert_same(reference.OPS[name](packed), formula(packed))


@chosen
def test_large_gates(chosen):
    packed = torch.tensor([[2.0] * 6, [-200.0, -20.0, -0.0, 0.0, 20.0, 200.0]]).flatten().requires_grad_()
    with emd_fast.use_backend(chosen):
        y = ops.geglu(packed)
    (mine,) = torch.autograd.grad(y.sum(), packed)
    assert y.tolist() == [0, 0, 0, 0, 40, 400] and mine.tolist() == [0, 0, 0, 0, 20, 200, 0, 0, 1, 1, 2, 2]


@chosen
def test_only_what_is_asked_for_is_computed(chosen, request):
    launched = request.getfixturevalue("launched") if chosen == "triton" else None
    packed = torch.randn(4, 6)
    with emd_fast.use_backend(chosen):
        assert not ops.geglu(packed).requires_grad
        ops.geglu(packed[:0].requires_grad_()).sum().backward()
    assert launched in (None, ["geglu_kernel"])
