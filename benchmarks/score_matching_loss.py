"""score_matching_loss, forward and with backward."""

from __future__ import annotations

from torch import Tensor

from benchmarks.harness.declare import BOTH, EMD_SHAPES, Bench, Case, Inputs, RandomTensors, Traffic
from emd_fast import ops
from emd_fast.backends import reference
from emd_fast.backends.reference.common import mean_per_sample, per_sample


def inputs(random: RandomTensors) -> Inputs:
    arguments = {name: random.network() for name in ("output", "x0", "x_t")}
    arguments |= {name: random.per_sample() for name in ("c_skip", "c_out", "weight")}
    elements = random.case.elements / random.case.shape[0]
    return Inputs(arguments, elements * random.per_sample())  # scales gradients to the order of 1


def eager(output: Tensor, x0: Tensor, x_t: Tensor, c_skip: Tensor, c_out: Tensor, weight: Tensor) -> Tensor:
    denoised = per_sample(c_skip, x0) * x_t + per_sample(c_out, x0) * output
    return weight * mean_per_sample((denoised - x0).square())


def exact(output: Tensor, x0: Tensor, x_t: Tensor, c_skip: Tensor, c_out: Tensor, weight: Tensor) -> Tensor:
    return reference.score_matching_loss(output, x0, x_t, c_skip, c_out, weight)


def traffic(case: Case) -> Traffic:
    forward = Traffic(3 * case.width * case.elements, 0)
    return Traffic(2 * forward.read, case.width * case.elements) if case.passes == BOTH else forward


BENCH = Bench(
    name="score_matching_loss",
    op=ops.score_matching_loss,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes=EMD_SHAPES,
    gradients=("output",),
)
