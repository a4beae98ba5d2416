"""perturb: alpha x0 + sigma eps with eps drawn in the kernel; x0 and result in the network dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.declare import EMD_SHAPES, Arguments, Bench, Case, Inputs, RandomTensors, Traffic
from emd_fast import Noise, ops
from emd_fast.backends import reference
from emd_fast.backends.reference.common import per_sample
from emd_fast.noise import NoiseStream


def inputs(random: RandomTensors) -> Inputs:
    return Inputs(
        {
            "x0": random.network(),
            "alpha": random.per_sample(),
            "sigma": random.per_sample(),
            "noise": Noise(random.seed, device=random.case.device),
            "stream": NoiseStream.FAKE_SCORE_EPS,
        }
    )


def eager(x0: Tensor, alpha: Tensor, sigma: Tensor, *, n: Tensor | None = None, **where: Any) -> Tensor:
    n = torch.randn_like(x0, dtype=torch.float32) if n is None else n
    return (per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * n).to(x0.dtype)


def exact(x0: Tensor, alpha: Tensor, sigma: Tensor, *, noise: Noise, stream: int) -> Tensor:
    return reference.perturb(x0, alpha, sigma, None, noise.state, stream, 0, x0.dtype)


def noises(arguments: Arguments) -> dict[str, Tensor]:
    return {
        "n": reference.normal(
            list(arguments["x0"].shape), arguments["noise"].state, arguments["stream"], 0, torch.float32
        )
    }


def traffic(case: Case) -> Traffic:
    return Traffic(case.width * case.elements, case.width * case.elements)


BENCH = Bench(
    name="perturb",
    op=ops.perturb,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes=EMD_SHAPES,
    noises=noises,
)
