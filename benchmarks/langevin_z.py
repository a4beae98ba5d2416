"""langevin_z: Langevin step on the latent, with z_grad in the dtype of a network's backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness.declare import EMD_SHAPES, Arguments, Bench, Case, Inputs, RandomTensors, Traffic
from emd_fast import Noise, ops
from emd_fast.backends import reference
from emd_fast.noise import NoiseStream


def inputs(random: RandomTensors) -> Inputs:
    noise = Noise(random.seed, device=random.case.device)
    return Inputs({"z": random.state(), "z_grad": random.network(), "step_size": 0.01, "noise": noise})


def eager(z: Tensor, z_grad: Tensor, *, step_size: float, noise: Noise, m: Tensor | None = None) -> Tensor:
    m = torch.randn_like(z) if m is None else m
    return z + step_size * (z_grad - z) + (2 * step_size) ** 0.5 * m


def exact(z: Tensor, z_grad: Tensor, *, step_size: float, noise: Noise) -> Tensor:
    reference.langevin_z(z, z_grad, step_size, None, False, noise.state, 0)
    return z


def noises(arguments: Arguments) -> dict[str, Tensor]:
    size, state = list(arguments["z"].shape), arguments["noise"].state
    return {"m": reference.normal(size, state, NoiseStream.LANGEVIN_Z, 0, torch.float32)}


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
