"""A convolution with frozen weights and its backward pass to the input, by each engine and in each memory format.

ADM and Stable Diffusion 1.5 spend most of their arithmetic in these. `--layout nhwc` is what fuse() asks for on a GPU,
and what our own loops take on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from benchmarks.harness.declare import DTYPES, LAYOUTS, Bench, Case, Draw, Function, Inputs
from emd_fast.fusion.convolution import convolution

# 3x3, as many channels out as in: the convolution that each resolution has most of.
ADM = ((16, 192, 64, 64), (16, 384, 32, 32), (16, 576, 16, 16), (16, 768, 8, 8))
CPU = ((128, 16, 8, 8), (128, 32, 4, 4), (16, 128, 16, 16), (4, 192, 32, 32))
SD15 = ((16, 320, 64, 64), (16, 640, 32, 32), (16, 1280, 16, 16), (16, 1280, 8, 8))


def inputs(draw: Draw) -> Inputs:
    channels, dtype = draw.case.shape[1], DTYPES[draw.case.dtype]
    weight = draw.normal(channels, channels, 3, 3) / (9 * channels) ** 0.5
    weight = weight.to(dtype, memory_format=LAYOUTS[draw.case.layout])
    return Inputs({"x": draw.network(), "weight": weight, "cotangent": draw.network()})


def eager(x: Tensor, weight: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    of_x, *_ = torch.ops.aten.convolution_backward(
        cotangent, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
    )
    return conv2d(x, weight, padding=1), of_x


def fused(x: Tensor, weight: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """As the layers of a fused network."""
    with torch.enable_grad():
        latent = x.detach().requires_grad_()
        y = convolution(latent, weight, padding=(1, 1))
        (of_x,) = torch.autograd.grad(y, latent, cotangent)
    return y.detach(), of_x


def measured(function: Function) -> Function:
    """With the engine that cuDNN finds fastest for each shape, by trying all at the first call. Two processes may find
    different ones, and with them other last digits."""

    def run(**arguments: Any) -> Any:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            return function(**arguments)

    return run


def served(bench: Bench, device: torch.device) -> dict[str, Function | str]:
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
    served=served,
    rotates=False,
    captures=False,  # engines are tried out at the first call
    dtype={"cpu": "fp32", "cuda": "bf16"},
    roundings=64,  # sums of 9 C products
)
