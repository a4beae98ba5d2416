"""A residual block with frozen weights, and its backward pass to the input: what an op that the compiler cannot look
into wins inside must not be lost around it.

x + conv(silu(shift + (1 + scale) norm(conv(silu(norm(x)))))), as ADM has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, silu

from benchmarks.convolution import ADM, SD15
from benchmarks.harness.declare import DTYPES, FORWARD, LAYOUTS, Bench, Case, Draw, Function, Inputs
from emd_fast import ops
from emd_fast.fusion.convolution import convolution

GROUPS = 32


def inputs(draw: Draw) -> Inputs:
    case, (batch, channels) = draw.case, draw.case.shape[:2]
    dtype = DTYPES[case.dtype]

    def filters() -> Tensor:
        drawn = draw.normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
        return drawn.to(dtype, memory_format=LAYOUTS[case.layout])

    arguments = {
        "x": draw.network(),
        "first": filters(),
        "second": filters(),
        "weight": draw.between(0.5, 1.5, channels).to(dtype),
        "bias": draw.normal(channels).to(dtype),
        "scale": draw.normal(batch, channels).to(dtype),
        "shift": draw.normal(batch, channels).to(dtype),
    }
    return Inputs(arguments, draw.network())


def eager(
    x: Tensor, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    groups = math.gcd(GROUPS, x.shape[1])
    h = conv2d(silu(group_norm(x, groups, weight, bias, 1e-5)), first, padding=1)
    h = group_norm(h, groups, weight, bias, 1e-5) * (1 + scale)[:, :, None, None] + shift[:, :, None, None]
    return x + conv2d(silu(h), second, padding=1)


def fused(
    x: Tensor, first: Tensor, second: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    groups = math.gcd(GROUPS, x.shape[1])
    h = convolution(ops.group_norm(x, groups, weight, bias, activation="silu"), first, padding=(1, 1))
    h = ops.group_norm(h, groups, weight, bias, scale=scale, shift=shift, activation="silu")
    return x + convolution(h, second, padding=(1, 1))


def served(bench: Bench, device: torch.device) -> dict[str, Function | str]:
    return {"fused": fused, "fused, compiled": torch.compile(fused, dynamic=False)}


def flops(case: Case) -> float:
    one_way = 2 * 2 * 9 * case.shape[1] * case.elements
    return one_way if case.passes == FORWARD else 2 * one_way


BENCH = Bench(
    name="residual_block",
    op=fused,
    inputs=inputs,
    eager=eager,
    exact=eager,
    traffic=None,
    shapes={"cpu": ((4, 64, 16, 16),), "cuda": ADM + SD15},
    axes=("B", "C", "H", "W"),
    gradients=("x",),
    flops=flops,
    served=served,
    rotates=False,
    dtype={"cpu": "fp32", "cuda": "bf16"},
    roundings=32,
)
