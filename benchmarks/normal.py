"""normal: normal numbers of the noise contract, compared with torch.randn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.declare import DTYPES, EMD_SHAPES, Bench, Case, Inputs, RandomTensors, Traffic
from emd_fast import Noise, ops
from emd_fast.backends import reference


def inputs(random: RandomTensors) -> Inputs:
    case = random.case
    noise = Noise(random.seed, device=case.device)
    return Inputs({"size": case.shape, "noise": noise, "stream": 20, "dtype": DTYPES[case.dtype]})


def eager(size: tuple[int, ...], noise: Noise, dtype: torch.dtype, **where: Any) -> Tensor:
    return torch.randn(size, device=noise.device, dtype=dtype)


def exact(size: tuple[int, ...], noise: Noise, stream: int, dtype: torch.dtype, substep: int = 0) -> Tensor:
    return reference.normal(list(size), noise.state, stream, substep, dtype)


def traffic(case: Case) -> Traffic:
    return Traffic(0, case.width * case.elements)


BENCH = Bench(
    name="normal",
    op=ops.normal,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes=EMD_SHAPES,
    moments=((0, 1), (1, 2**0.5)),
    layouts=False,
)
