"""geglu, forward and with backward, at the shapes of Stable Diffusion 1.5."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu

from benchmarks.harness.declare import BOTH, DTYPES, Bench, Case, Inputs, RandomTensors, Traffic
from emd_fast import ops
from emd_fast.backends import reference

SD15 = tuple((16, tokens, 4 * channels) for tokens, channels in ((4096, 320), (1024, 640), (256, 1280), (64, 1280)))


def inputs(random: RandomTensors) -> Inputs:
    *tokens, channels = random.case.shape
    dtype = DTYPES[random.case.dtype]
    packed, cotangent = (random.normal(*tokens, width).to(dtype) for width in (2 * channels, channels))
    return Inputs({"packed": packed}, cotangent)


def eager(packed: Tensor) -> Tensor:
    values, gates = packed.chunk(2, dim=-1)
    return values * gelu(gates)


def exact(packed: Tensor) -> Tensor:
    return reference.geglu(packed)


def traffic(case: Case) -> Traffic:
    once = case.width * case.elements
    # The backward pass reads values, gates and the gradient, and writes two gradients.
    return Traffic(5 * once, 3 * once) if case.passes == BOTH else Traffic(2 * once, once)


BENCH = Bench(
    name="geglu",
    op=ops.geglu,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes={"cpu": ((4, 1024, 2560),), "cuda": SD15},
    axes=("B", "[H]", "[W]", "channels"),
    gradients=("packed",),
    layouts=False,
)
