"""Convolution with frozen weights and its backward pass to the input, per engine and memory format.

ADM and Stable Diffusion 1.5 spend most of their FLOPs in these convolutions. fuse() uses
`--layout nhwc` on a GPU. The CPU kernels of emd_fast require it as well.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks.harness.declare import DTYPES, LAYOUTS, Bench, Case, Function, Inputs, RandomTensors
from emd_fast.ops.convolution import convolution

# 3x3 with equal input and output channels: the most frequent convolution at each resolution.
ADM = ((16, 192, 64, 64), (16, 384, 32, 32), (16, 576, 16, 16), (16, 768, 8, 8))
CPU = ((128, 16, 8, 8), (128, 32, 4, 4), (16, 128, 16, 16), (4, 192, 32, 32))
SD15 = ((16, 320, 64, 64), (16, 640, 32, 32), (16, 1280, 16, 16), (16, 1280, 8, 8))


def inputs(random: RandomTensors) -> Inputs:
    channels, dtype = random.case.shape[1], DTYPES[random.case.dtype]
    weight = random.normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
    weight = weight.to(dtype, memory_format=LAYOUTS[random.case.layout])
    return Inputs({"x": random.network(), "weight": weight, "cotangent": random.network()})


def eager(x: Tensor, weight: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    of_x, *_ = torch.ops.aten.convolution_backward(
        cotangent, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
    )
    return conv2d(x, weight, padding=1), of_x


def fused(x: Tensor, weight: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the convolution as a layer of a fused network does."""
    with torch.enable_grad():
        latent = x.detach().requires_grad_()
        y = convolution(latent, weight, padding=(1, 1))
        (of_x,) = torch.autograd.grad(y, latent, cotangent)
    return y.detach(), of_x


def measured(function: Function) -> Function:
    """Runs with torch.backends.cudnn.benchmark.

    cuDNN then tries its engines at the first call of each shape and keeps the fastest. Two processes
    may choose different engines and get results that differ in the last digits.
    """

    def run(**arguments: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return function(**arguments)

    return run


def implementations(bench: Bench, device: torch.device) -> dict[str, Function | str]:
    return {"fused": fused, "fused, cudnn.benchmark": measured(fused) if device.type == "cuda" else "cuDNN needs a GPU"}


def peers(case: Case) -> Mapping[str, Function]:
    if case.device.type != "cuda":
        return {}
    compiled = functools.partial(torch.compile, eager, dynamic=False)
    return {"cudnn.benchmark": measured(eager), "max-autotune": compiled(mode="max-autotune-no-cudagraphs")}


def flops(case: Case) -> float:
    return 2 * 2 * 9 * case.shape[1] * case.elements


BENCH = Bench(
    name="convolution",
    op=fused,
    inputs=inputs,
    eager=eager,
    exact=eager,
    traffic=None,
    shapes={"cpu": CPU, "cuda": ADM + SD15},
    axes=("B", "C", "H", "W"),
    flops=flops,
    peers=peers,
    implementations=implementations,
    rotates=False,
    compiled=frozenset({"torch.compile", "max-autotune"}),
    captures=False,  # cuDNN tries engines at the first call, which a capture does not allow
    dtype={"cpu": "fp32", "cuda": "bf16"},
    roundings=64,  # each result is a sum of 9 C terms
)
