"""m_step_loss, forward and with backward: the closed form compared with the plain regression."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.declare import BOTH, EMD_SHAPES, Bench, Case, Inputs, RandomTensors, Traffic
from emd_fast import ops
from emd_fast.backends import reference
from emd_fast.backends.reference.common import mean_per_sample, per_sample


def inputs(random: RandomTensors) -> Inputs:
    arguments = {"generated": random.network(), "drift": random.state()}
    arguments |= {name: random.per_sample() for name in ("alpha", "sigma", "weight")}
    elements = random.case.elements / random.case.shape[0]
    return Inputs(arguments, elements * random.per_sample())  # scales gradients to the order of 1


def eager(generated: Tensor, drift: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    mean = per_sample(alpha, generated) * generated
    target = (mean + per_sample(sigma, generated) * drift).detach()
    return weight / (2 * sigma.square()) * mean_per_sample((mean - target).square())


def exact(generated: Tensor, drift: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    loss = reference.m_step_loss(generated, drift, alpha, sigma, weight)
    slope = reference.m_step_loss_backward(torch.ones_like(loss), drift, alpha, sigma, weight, drift.dtype)
    # The reference computes the gradient in closed form. A term of value 0 with this slope gives
    # the gradient to autograd.
    along = (generated * slope).flatten(1).sum(1)
    return loss + along - along.detach()


def traffic(case: Case) -> Traffic:
    forward = Traffic(4 * case.elements, 0)
    return Traffic(2 * forward.read, case.width * case.elements) if case.passes == BOTH else forward


BENCH = Bench(
    name="m_step_loss",
    op=ops.m_step_loss,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes=EMD_SHAPES,
    gradients=("generated",),
)
