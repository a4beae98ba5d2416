import pytest
import torch
from helpers import (
    assert_as_good_as_eager,
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


def regression(generated, drift, alpha, sigma, weight):
    """Section 1 read literally, in float64: weight / 2 mean((alpha g - target)^2 / sigma^2), the target fixed."""
    g, d = generated.double(), drift.double()
    a, s = column(alpha.double(), g), column(sigma.double(), g)
    target = (a * g + s * d).detach()
    return weight.double() / 2 * per_element(((a * g - target) / s).square()).mean(1)


def case(shape, g, dtype=torch.float32, layout="contiguous", scale=1.0):
    return (
        draw(shape, g, dtype, layout), draw(shape, g, scale=scale),
        *(per_sample(shape[0], g, 0.01, 1.0) for _ in range(3)),
    )  # fmt: skip


def eager_value(drift, weight):
    return weight / 2 * per_element(drift.square()).mean(1)


@given(shape=shapes(), dtype=dtypes, layout=layouts, seed=seeds)
def test_value_and_gradient_against_the_regression(backend, shape, dtype, layout, seed):
    g = seeded(seed)
    generated, drift, alpha, sigma, weight = case(shape, g, dtype, layout)
    generated = generated.detach().requires_grad_()
    loss = ops.m_step_loss(generated, drift, alpha, sigma, weight)
    assert loss.dtype == torch.float32 and loss.shape == shape[:1]
    cotangent = torch.randn(shape[0], generator=g)
    (grad,) = torch.autograd.grad(loss, generated, cotangent)
    assert grad.dtype == dtype and grad.shape == shape

    wide = generated.detach().double().requires_grad_()
    exact = regression(wide, drift, alpha, sigma, weight)
    # Of the regression itself a little is lost even in float64, of the size of 1e-16 / sigma^2.
    assert_as_good_as_eager(loss, exact.detach(), eager_value(drift, weight))
    (exact_grad,) = torch.autograd.grad(exact, wide, cotangent.double())
    n = max(drift[0].numel() if len(drift) else 1, 1)
    eager_grad = (column(-cotangent * weight * (alpha / sigma) / n, drift) * drift).to(dtype)
    assert_as_good_as_eager(grad, exact_grad, eager_grad)


def test_small_noise_loses_nothing(backend):
    """alpha g is 1, sigma drift 1e-9: their float32 sum is 1, and the difference that the formula avoids is 0."""
    x = torch.ones(1, 4, requires_grad=True)
    drift, one = torch.full((1, 4), 1e-6), torch.ones(1)
    ops.m_step_loss(x, drift, one, torch.tensor([1e-3]), one).sum().backward()
    assert torch.allclose(x.grad, torch.full((1, 4), -1e-6 * 1e3 / 4), rtol=1e-5)


def test_zero_drift_gives_exactly_no_loss_and_no_gradient(backend):
    x = torch.randn(3, 7, requires_grad=True)
    loss = ops.m_step_loss(x, torch.zeros(3, 7), torch.ones(3), torch.full((3,), 0.01), torch.ones(3))
    loss.sum().backward()
    assert not loss.any() and not x.grad.any()


def test_gradient_of_a_channels_last_input_and_an_expanded_cotangent(backend):
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    drift, one = torch.randn(2, 3, 4, 5), torch.ones(2)
    ops.m_step_loss(x, drift, one, one, one).mean().backward()
    assert torch.allclose(x.grad, -drift / 60 / 2)


@pytest.mark.parametrize("shape", [(3, 0), (2, 0, 4)])
def test_losses_of_samples_without_elements_are_means_over_nothing(backend, shape):
    x, v = torch.empty(shape), torch.ones(shape[0])
    assert ops.m_step_loss(x, x, v, v, v).isnan().all() and ops.score_matching_loss(x, x, x, v, v, v).isnan().all()
