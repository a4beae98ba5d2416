"""residual: the end of a residual block with the biases of both convolutions, against PyTorch's additions."""

from __future__ import annotations

from torch import Tensor

from benchmarks.group_norm import ADM, SD15
from benchmarks.harness.declare import BOTH, DTYPES, Bench, Case, Inputs, RandomTensors, Traffic
from emd_fast import ops
from emd_fast.backends import reference


def inputs(random: RandomTensors) -> Inputs:
    channels, dtype = random.case.shape[1], DTYPES[random.case.dtype]
    biases = {name: random.normal(channels).to(dtype) for name in ("bias", "skip_bias")}
    return Inputs({"x": random.network(), "skip": random.network(), **biases}, random.network())


def eager(x: Tensor, skip: Tensor, bias: Tensor, skip_bias: Tensor) -> Tensor:
    ones = [1] * (x.dim() - 2)
    return (x + bias.reshape(-1, *ones)) + (skip + skip_bias.reshape(-1, *ones))


def exact(x: Tensor, skip: Tensor, bias: Tensor, skip_bias: Tensor) -> Tensor:
    return reference.residual(x, skip, bias, skip_bias, 1.0)


def traffic(case: Case) -> Traffic:
    once = case.width * case.elements
    # The backward pass to x and skip passes the gradient on; the biases take its sums.
    return Traffic(3 * once, once) if case.passes == BOTH else Traffic(2 * once, once)


BENCH = Bench(
    name="residual",
    op=ops.residual,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes={"cpu": ((8, 192, 64, 64), (8, 384, 32, 32)), "cuda": ADM + SD15},
    gradients=("x", "skip", "bias", "skip_bias"),
)
