import torch
from helpers import (
    assert_as_good_as_eager,
    assert_same,
    column,
    draw,
    dtypes,
    layouts,
    per_element,
    per_sample,
    seeded,
    seeds,
    shapes,
)
from hypothesis import given

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


def test_gradcheck_of_the_reference():
    g = seeded(1)
    output, *rest = [a.double() for a in case((2, 3, 2), g, *[torch.float32] * 3, "contiguous")]
    assert torch.autograd.gradcheck(reference.OPS["score_matching_loss"], (output.requires_grad_(), *rest))
    cotangent = torch.randn(2, generator=g, dtype=torch.float64)
    mine = reference.OPS["score_matching_loss_backward"](cotangent, output.detach(), *rest)
    (its,) = torch.autograd.grad(formula(output, *rest), output, cotangent)
    assert torch.allclose(mine, its, rtol=1e-12, atol=1e-14)


def test_a_sum_is_the_same_in_every_batch_and_every_run(backend):
    case = [draw((4, 3, 50, 40), seeded(i), layout="channels_last") for i in range(3)]
    numbers = [per_sample(4, seeded(3))] * 3
    whole = ops.score_matching_loss(*case, *numbers)
    parts = [ops.score_matching_loss(*(v[s] for v in (*case, *numbers))) for s in (slice(0, 1), slice(1, 4))]
    assert_same(torch.cat(parts), whole)
    assert_same(ops.score_matching_loss(*case, *numbers), whole)
