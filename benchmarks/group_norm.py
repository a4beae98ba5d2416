"""group_norm with SiLU, forward and with backward, compared with apex and Liger if installed."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.declare import BOTH, DTYPES, Bench, Case, Function, Inputs, RandomTensors, Traffic
from emd_fast import ops
from emd_fast.backends import reference

GROUPS = 32
# All channel counts that each network normalises (concatenations included), each at the largest
# resolution where it occurs.
_ADM = ((192, 64), (384, 64), (576, 64), (384, 32), (768, 32), (960, 32), (576, 16), (1152, 16), (1344, 16), (768, 8))
_SD15 = ((320, 64), (640, 64), (960, 64), (640, 32), (1280, 32), (1920, 32), (1280, 16), (2560, 16), (1280, 8))
ADM = tuple((64, channels, size, size) for channels, size in (*_ADM, (1536, 8)))
SD15 = tuple((16, channels, size, size) for channels, size in _SD15)


def inputs(random: RandomTensors) -> Inputs:
    dtype, channels = DTYPES[random.case.dtype], random.case.shape[1]
    arguments = {
        "x": random.network(),
        "num_groups": math.gcd(GROUPS, channels),
        "weight": random.uniform(0.5, 1.5, channels).to(dtype),
        "bias": random.normal(channels).to(dtype),
        "activation": "silu",
    }
    return Inputs(arguments, random.network())


def eager(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, activation: str) -> Tensor:
    return nn.functional.silu(nn.functional.group_norm(x, num_groups, weight, bias, 1e-5))


def exact(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, activation: str) -> Tensor:
    return reference.group_norm(x, num_groups, weight, bias, 1e-5, None, None, None, True)[0]


def traffic(case: Case) -> Traffic:
    once = case.width * case.elements
    # The backward pass reads the gradient and x. A second read of x within a pass can hit the cache.
    return Traffic(3 * once, 2 * once) if case.passes == BOTH else Traffic(once, once)


def peers(case: Case) -> Mapping[str, Function]:
    found: dict[str, Function] = {}
    if case.device.type == "cuda" and _installed("group_norm_cuda") and case.layout == "nhwc":
        found["apex"] = _apex
    if case.device.type == "cuda" and _installed("liger_kernel"):
        found["liger"] = _liger
    return found


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _apex(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, activation: str) -> Any:
    from apex.contrib.group_norm import GroupNorm

    # What apex has no kernel for it hands to PyTorch.
    if x.shape[1] not in GroupNorm.SUPPORTED_CHANNELS or num_groups not in GroupNorm.SUPPORTED_GROUPS:
        raise RuntimeError(f"apex has no kernel for {x.shape[1]} channels in {num_groups} groups")
    module = _apex_module(num_groups, x.shape[1], x.device, weight.dtype, activation)
    return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))


@functools.cache
def _apex_module(groups: int, channels: int, device: torch.device, dtype: torch.dtype, activation: str) -> nn.Module:
    from apex.contrib.group_norm import GroupNorm

    module: nn.Module = GroupNorm(groups, channels, device=device, dtype=dtype, act=activation)
    return module


def _liger(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, activation: str) -> Any:
    from liger_kernel.transformers.functional import liger_group_norm

    return nn.functional.silu(liger_group_norm(x, weight, bias, x.shape[1], num_groups, 1e-5))


BENCH = Bench(
    name="group_norm",
    op=ops.group_norm,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes={"cpu": ((8, 192, 64, 64), (8, 384, 32, 32), (8, 576, 16, 16), (8, 768, 8, 8)), "cuda": ADM + SD15},
    gradients=("x", "weight", "bias"),
    peers=peers,
)
