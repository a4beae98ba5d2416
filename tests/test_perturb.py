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

from emd_fast import Noise, ops
from emd_fast.backends import reference


def formula(x0, alpha, sigma, eps):
    return column(alpha, x0) * x0 + column(sigma, x0) * eps


@given(shape=shapes(), of_x0=dtypes, of_eps=dtypes, out=st.one_of(st.none(), dtypes), layout=layouts, seed=seeds)
def test_given_noise(backend, shape, of_x0, of_eps, out, layout, seed):
    g = seeded(seed)
    x0, eps = draw(shape, g, of_x0, layout, scale=5), draw(shape, g, of_eps, layout)
    alpha, sigma = per_sample(shape[0], g), per_sample(shape[0], g)
    before = x0.clone(), eps.clone()
    x_t = ops.perturb(x0, alpha, sigma, eps=eps, dtype=out)
    out = out or of_x0
    assert x_t.is_contiguous() and x_t.dtype == out
    exact = formula(x0.double(), alpha.double(), sigma.double(), eps.double())
    assert_as_good_as_eager(x_t, exact, formula(x0, alpha, sigma, eps).to(out))
    assert_same(x0, before[0])
    assert_same(eps, before[1])


@given(shape=shapes(), dtype=dtypes, layout=layouts, seed=seeds)
def test_drawn_noise(backend, shape, dtype, layout, seed):
    g = seeded(seed)
    x0 = draw(shape, g, dtype, layout)
    alpha, sigma = per_sample(shape[0], g), per_sample(shape[0], g)
    where = {"seed": seed, "step": 3, "first_sample": 17}
    x_t = ops.perturb(x0, alpha, sigma, noise=Noise(**where), stream=0, substep=2, dtype=torch.float32)
    n = normals(shape, stream=0, substep=2, **where)
    exact = formula(x0.double(), alpha.double(), sigma.double(), n)
    eager = formula(x0, alpha, sigma, n.float())
    assert_as_good_as_eager(x_t, exact, eager, more=2 * NOISE_ERROR)  # sigma is at most 2


def test_a_split_batch_is_the_whole(backend):
    x0, alpha, sigma = torch.randn(5, 9), torch.rand(5), torch.rand(5)
    whole = ops.perturb(x0, alpha, sigma, noise=Noise(4, first_sample=3), stream=5)
    parts = [
        ops.perturb(x0[s], alpha[s], sigma[s], noise=Noise(4, first_sample=3 + s.start), stream=5)
        for s in (slice(0, 2), slice(2, 5))
    ]
    assert torch.equal(torch.cat(parts), whole)


@given(shape=shapes(), of_x0=dtypes, out=dtypes, layout=layouts, seed=seeds)
def test_gradient(backend, shape, of_x0, out, layout, seed):
    g = seeded(seed)
    x0, eps = draw(shape, g, of_x0, layout), draw(shape, g)
    alpha, sigma = per_sample(shape[0], g), per_sample(shape[0], g)
    cotangent = draw(shape, g, out, layout)
    x0 = x0.detach().requires_grad_()
    ops.perturb(x0, alpha, sigma, eps=eps, dtype=out).backward(cotangent)
    assert x0.grad.dtype == of_x0
    exact = column(alpha.double(), x0) * cotangent.double()
    assert_as_good_as_eager(x0.grad, exact, (column(alpha, x0) * cotangent).to(of_x0))


def test_float64_gradcheck_of_the_reference():
    g = seeded(0)
    x0, eps = (draw((2, 3), g).double() for _ in range(2))
    alpha, sigma = per_sample(2, g).double(), per_sample(2, g).double()
    run = lambda x: reference.OPS["perturb"](x, alpha, sigma, eps, None, 0, 0, torch.float64)  # noqa: E731
    assert torch.autograd.gradcheck(run, x0.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_never_aliases_its_input(backend, dtype):
    x0 = laid_out(torch.ones(2, 3, dtype=dtype), "contiguous")
    out = ops.perturb(x0, torch.ones(2), torch.zeros(2), eps=torch.ones(2, 3))
    assert out.data_ptr() != x0.data_ptr() and torch.equal(out, x0)
