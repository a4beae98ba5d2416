"""uniform: uniform numbers of the noise contract, compared with torch.rand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.declare import EMD_SHAPES, Bench, Case, Inputs, RandomTensors, Traffic
from emd_fast import Noise, ops
from emd_fast.backends import reference


def inputs(random: RandomTensors) -> Inputs:
    return Inputs({"size": random.case.shape, "noise": Noise(random.seed, device=random.case.device), "stream": 20})


def eager(size: tuple[int, ...], noise: Noise, **where: Any) -> Tensor:
    return torch.rand(size, device=noise.device)


def exact(size: tuple[int, ...], noise: Noise, stream: int, substep: int = 0) -> Tensor:
    return reference.uniform(list(size), noise.state, stream, substep)


def traffic(case: Case) -> Traffic:
    return Traffic(0, 4 * case.elements)


BENCH = Bench(
    name="uniform",
    op=ops.uniform,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes=EMD_SHAPES,
    moments=((1 / 2, (1 / 12) ** 0.5), (1 / 3, (4 / 45) ** 0.5)),
    layouts=False,
)
