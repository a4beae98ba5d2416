"""Residual block with frozen weights and its backward pass to the input.

The compiler cannot fuse across a custom op. This benchmark shows whether the op saves more than that
costs. The block is the one of ADM: x + conv(silu(shift + (1 + scale) norm(conv(silu(norm(x)))))).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, group_norm, silu

from benchmarks.convolution import ADM, SD15
from benchmarks.harness.declare import DTYPES, FORWARD, LAYOUTS, Bench, Case, Function, Inputs, RandomTensors
from emd_fast import ops
from emd_fast.ops.convolution import convolution

GROUPS = 32


def inputs(random: RandomTensors) -> Inputs:
    case, (batch, channels) = random.case, random.case.shape[:2]
    dtype = DTYPES[case.dtype]

    def filters() -> Tensor:
        drawn = random.normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
        return drawn.to(dtype, memory_format=LAYOUTS[case.layout])

    arguments = {
        "x": random.network(),
        "first": filters(),
        "second": filters(),
        "weight": random.uniform(0.5, 1.5, channels).to(dtype),
        "bias": random.normal(channels).to(dtype),
        "scale": random.normal(batch, channels).to(dtype),
        "shift": random.normal(batch, channels).to(dtype),
    }
    return Inputs(arguments, random.network())


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


def implementations(bench: Bench, device: torch.device) -> dict[str, Function | str]:
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
    implementations=implementations,
    rotates=False,
    compiled=frozenset({"torch.compile", "emd_fast fused, compiled"}),
    dtype={"cpu": "fp32", "cuda": "bf16"},
    roundings=32,
)
