"""langevin_z: the Langevin step on the latent, z_grad as a network's backward pass returns it."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.declare import EMD_SHAPES, Arguments, Bench, Case, Draw, Inputs, Traffic
from emd_fast import Noise, ops
from emd_fast.backends import reference
from emd_fast.noise import Stream


def inputs(draw: Draw) -> Inputs:
    noise = Noise(draw.seed, device=draw.case.device)
    return Inputs({"z": draw.state(), "z_grad": draw.network(), "step_size": 0.01, "noise": noise})


def eager(z: Tensor, z_grad: Tensor, *, step_size: float, noise: Noise, m: Tensor | None = None) -> Tensor:
    m = torch.randn_like(z) if m is None else m
    return z + step_size * (z_grad - z) + (2 * step_size) ** 0.5 * m


def exact(z: Tensor, z_grad: Tensor, *, step_size: float, noise: Noise) -> Tensor:
    reference.langevin_z(z, z_grad, step_size, None, noise.state, 0)
    return z


def noises(arguments: Arguments) -> dict[str, Tensor]:
    size, state = list(arguments["z"].shape), arguments["noise"].state
    return {"m": reference.normal(size, state, Stream.LANGEVIN_Z, 0, torch.float32)}


def traffic(case: Case) -> Traffic:
    return Traffic((4 + case.width) * case.elements, 4 * case.elements)


BENCH = Bench(
    name="langevin_z",
    op=ops.langevin_z,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes=EMD_SHAPES,
    written=("z",),
    noises=noises,
)
