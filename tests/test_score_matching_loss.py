import pytest
import torch
from helpers import (
    LAYOUTS,
    assert_as_good_as_eager,
    assert_same,
    column,
    draw,
    dtypes,
    layouts,
    naming,
    per_element,
    per_sample,
    seeded,
    seeds,
    shapes,
)
from hypothesis import given

import emd_fast
from emd_fast import ops
from emd_fast.backends import reference


def formula(output, x0, x_t, c_skip, c_out, weight):
    """The formula of docs/algorithm.md, in the dtypes of its arguments."""
    residual = column(c_skip, x0) * x_t + column(c_out, x0) * output - x0
    return weight * per_element(residual.square()).mean(1)


def case(shape, g, of_output, of_x0, of_x_t, layout, scale=1.0):
    return [
        draw(shape, g, of_output, layout, scale), draw(shape, g, of_x0, layout, scale),
        draw(shape, g, of_x_t, layout, scale),
        torch.randn(shape[0], generator=g), torch.randn(shape[0], generator=g), per_sample(shape[0], g),
    ]  # fmt: skip


def check(arguments, g):
    shape, dtype = tuple(arguments[0].shape), arguments[0].dtype
    kept = [a.clone() for a in arguments]
    cotangent = torch.randn(shape[0], generator=g)
    results = []
    for run, inputs in (
        (ops.score_matching_loss, arguments),
        (formula, [a.double() for a in arguments]),
        (formula, arguments),
    ):
        output = inputs[0].detach().requires_grad_()
        loss = run(output, *inputs[1:])
        (grad,) = torch.autograd.grad(loss, output, cotangent.to(loss.dtype))
        results.append((loss.detach(), grad))
    (loss, grad), (exact, exact_grad), (eager, eager_grad) = results
    assert loss.dtype == torch.float32 and grad.dtype == dtype and grad.shape == shape
    assert_as_good_as_eager(loss, exact, eager, what="loss")
    assert_as_good_as_eager(grad, exact_grad, eager_grad, what="gradient")
    for now, before in zip(arguments, kept, strict=True):
        assert_same(now, before)


@given(shape=shapes(), of_output=dtypes, of_x0=dtypes, of_x_t=dtypes, layout=layouts, seed=seeds)
def test_value_and_gradient_against_float64(backend, shape, of_output, of_x0, of_x_t, layout, seed):
    g = seeded(seed)
    check(case(shape, g, of_output, of_x0, of_x_t, layout), g)


@pytest.mark.parametrize("layout", [*LAYOUTS, "channels_last"])
@pytest.mark.parametrize("shape", [(3, 5, 33, 31), (2, 3, 128, 128)])
def test_large_and_strided(backend, shape, layout):
    g = seeded(0)
    check(case(shape, g, torch.bfloat16, torch.float32, torch.float16, layout, scale=3), g)


def test_gradcheck_of_the_reference():
    g = seeded(1)
    output, *rest = [a.double() for a in case((2, 3, 2), g, *[torch.float32] * 3, "contiguous")]
    assert torch.autograd.gradcheck(reference.OPS["score_matching_loss"], (output.requires_grad_(), *rest))
    cotangent = torch.randn(2, generator=g, dtype=torch.float64)
    mine = reference.OPS["score_matching_loss_backward"](cotangent, output.detach(), *rest)
    (its,) = torch.autograd.grad(formula(output, *rest), output, cotangent)
    assert torch.allclose(mine, its, rtol=1e-12, atol=1e-14)


def test_gradient_through_a_network_is_that_of_the_formula(backend):
    g = seeded(2)
    arguments = case((4, 5), g, *[torch.float32] * 3, "contiguous")
    grads = []
    for run in (ops.score_matching_loss, formula):
        w = torch.full((5,), 0.5, requires_grad=True)
        run(arguments[0] * w, *arguments[1:]).mean().backward()
        grads.append(w.grad)
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


def test_no_gradient_is_computed_where_none_is_asked(backend):
    X, ONE = torch.ones(2, 3), torch.ones(2)
    assert not ops.score_matching_loss(X, X, X, ONE, ONE, ONE).requires_grad


@pytest.mark.parametrize("shape", [(3, 0), (2, 0, 4)])
def test_samples_without_elements_agree_between_backends(shape):
    x, one = torch.empty(shape), torch.ones(shape[0])
    results = []
    for name in ("reference", "auto"):
        with emd_fast.use_backend(name):
            results.append(ops.score_matching_loss(x, x, x, one, one, one))
    assert torch.equal(results[0].isnan(), results[1].isnan())


ONE, X = torch.ones(2), torch.ones(2, 3)
BAD = [
    ({"output": X.double()}, TypeError, "output"),
    ({"output": 1.0}, TypeError, "output"),
    ({"output": torch.tensor(1.0)}, ValueError, "output"),
    ({"x0": torch.ones(2, 4)}, ValueError, "x0"),
    ({"x0": X.long()}, TypeError, "x0"),
    ({"x0": X.clone().requires_grad_()}, ValueError, "x0"),
    ({"x0": X.to("meta")}, ValueError, "x0"),
    ({"x_t": torch.ones(2, 1)}, ValueError, "x_t"),
    ({"x_t": X.clone().requires_grad_()}, ValueError, "x_t"),
    ({"c_skip": torch.ones(3)}, ValueError, "c_skip"),
    ({"c_skip": 1.0}, TypeError, "c_skip"),
    ({"c_out": ONE.double()}, TypeError, "c_out"),
    ({"c_out": torch.tensor([1.0, float("inf")])}, ValueError, "c_out"),
    ({"weight": torch.tensor([1.0, float("nan")])}, ValueError, "weight"),
    ({"weight": ONE.to("meta")}, ValueError, "weight"),
]


@pytest.mark.parametrize(("changed", "error", "named"), BAD)
def test_bad_input(changed, error, named):
    given = {"output": X, "x0": X, "x_t": X, "c_skip": ONE, "c_out": ONE, "weight": ONE, **changed}
    with pytest.raises(error, match=naming(named)):
        ops.score_matching_loss(**given)
