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
    laid_out,
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
    x_t = ops.perturb(x0, alpha, sigma, noise=Noise(**where), stream=5, substep=2, dtype=torch.float32)
    n = normals(shape, stream=5, substep=2, **where)
    exact = formula(x0.double(), alpha.double(), sigma.double(), n)
    eager = formula(x0, alpha, sigma, n.float())
    assert_as_good_as_eager(x_t, exact, eager, more=2 * NOISE_ERROR)  # sigma is at most 2


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels_last"])
@pytest.mark.parametrize("shape", [(3, 5, 17, 19), (2, 3, 64, 64)])
def test_large_and_strided(backend, shape, layout):
    g = seeded(0)
    x0, eps = draw(shape, g, torch.bfloat16, layout), draw(shape, g)
    alpha, sigma = per_sample(shape[0], g), per_sample(shape[0], g)
    exact = formula(x0.double(), alpha.double(), sigma.double(), eps.double())
    x_t = ops.perturb(x0, alpha, sigma, eps=eps, dtype=torch.float32)
    assert_as_good_as_eager(x_t, exact, formula(x0, alpha, sigma, eps))


def test_drawn_is_what_normal_draws(backend):
    x0, alpha, sigma = torch.zeros(3, 50), torch.ones(3), torch.ones(3)
    drawn = ops.perturb(x0, alpha, sigma, noise=Noise(4), stream=0)  # stream 0 is a stream, not a missing one
    assert torch.equal(drawn, ops.normal((3, 50), Noise(4), stream=0))


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


def test_no_gradient_where_none_is_asked(backend):
    out = ops.perturb(torch.ones(2, 3), torch.ones(2), torch.ones(2), eps=torch.ones(2, 3))
    assert not out.requires_grad


ONE = torch.ones(2)
X = torch.ones(2, 3)
BAD = [
    ({"x0": [1.0]}, TypeError, "x0"),
    ({"x0": X.double()}, TypeError, "x0"),
    ({"x0": X.long()}, TypeError, "x0"),
    ({"x0": torch.tensor(1.0)}, ValueError, "x0"),
    ({"alpha": torch.ones(3)}, ValueError, "alpha"),
    ({"alpha": torch.ones(2, 1)}, ValueError, "alpha"),
    ({"alpha": 1.0}, TypeError, "alpha"),
    ({"alpha": ONE.half()}, TypeError, "alpha"),
    ({"alpha": ONE.clone().requires_grad_()}, ValueError, "alpha"),
    ({"alpha": torch.tensor([1.0, float("nan")])}, ValueError, "alpha"),
    ({"sigma": torch.tensor([1.0, float("inf")])}, ValueError, "sigma"),
    ({"sigma": torch.ones(2, device="meta")}, ValueError, "sigma"),
    ({"eps": torch.ones(2, 4)}, ValueError, "eps"),
    ({"eps": torch.ones(3)}, ValueError, "eps"),
    ({"eps": X.double()}, TypeError, "eps"),
    ({"eps": X.to("meta")}, ValueError, "eps"),
    ({"eps": X.clone().requires_grad_()}, ValueError, "eps"),
    ({"noise": Noise(0), "stream": 1}, ValueError, "either eps or noise"),
    ({"eps": None}, ValueError, "either eps or noise"),
    ({"eps": None, "noise": Noise(0)}, ValueError, "stream"),
    ({"eps": None, "noise": 7, "stream": 1}, TypeError, "noise"),
    ({"eps": None, "noise": Noise(0, device="meta"), "stream": 1}, ValueError, "noise"),
    ({"eps": None, "noise": Noise(0), "stream": 2**16}, ValueError, "stream"),
    ({"dtype": torch.float64}, TypeError, "dtype"),
]


@pytest.mark.parametrize(("changed", "error", "named"), BAD)
def test_bad_input(changed, error, named):
    given = {"x0": X, "alpha": ONE, "sigma": ONE, "eps": X, **changed}
    with pytest.raises(error, match=naming(named)):
        ops.perturb(given.pop("x0"), given.pop("alpha"), given.pop("sigma"), **given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_never_aliases_its_input(backend, dtype):
    x0 = laid_out(torch.ones(2, 3, dtype=dtype), "contiguous")
    out = ops.perturb(x0, ONE, torch.zeros(2), eps=X)
    assert out.data_ptr() != x0.data_ptr() and torch.equal(out, x0)
