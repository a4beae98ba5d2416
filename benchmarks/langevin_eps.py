"""langevin_eps with two network outputs and x=None.

This is the case where teacher and fake score share one parametrization.
"""

from __future__ import annotations

from collections.abc import Sequence

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
            "eps": random.state(),
            "drift": random.state(),
            "x": None,
            "outputs": [random.network(), random.network()],
            "coefs": random.normal(random.case.shape[0], 2),
            "alpha": random.per_sample(),
            "sigma": random.per_sample(),
            "step_size": 0.16,
            "noise": Noise(random.seed, device=random.case.device),
        }
    )


def eager(
    eps: Tensor,
    drift: Tensor,
    x: Tensor | None,
    outputs: Sequence[Tensor],
    coefs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    step_size: float,
    noise: Noise,
    n: Tensor | None = None,
) -> tuple[Tensor, ...]:
    k = coefs.reshape(*coefs.shape, *[1] * (eps.dim() - 1))
    delta = k[:, 0] * outputs[0] + k[:, 1] * outputs[1]
    pull = per_sample(sigma, eps) * delta
    n = torch.randn_like(eps) if n is None else n
    drift = (1 - step_size) * drift + step_size * pull
    eps = eps + step_size * (pull - eps) + (2 * step_size) ** 0.5 * n
    return eps, drift, (per_sample(alpha, eps) * delta).to(outputs[0].dtype)


def exact(
    eps: Tensor,
    drift: Tensor,
    x: Tensor | None,
    outputs: Sequence[Tensor],
    coefs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    step_size: float,
    noise: Noise,
) -> tuple[Tensor, ...]:
    cotangent = reference.langevin_eps(
        eps, drift, x, list(outputs), coefs, alpha, sigma, step_size, None, False, noise.state, 0, eps.dtype
    )
    return eps, drift, cotangent


def noises(arguments: Arguments) -> dict[str, Tensor]:
    size, state = list(arguments["eps"].shape), arguments["noise"].state
    return {"n": reference.normal(size, state, NoiseStream.LANGEVIN_EPS, 0, torch.float32)}


def traffic(case: Case) -> Traffic:
    return Traffic((8 + 2 * case.width) * case.elements, (8 + case.width) * case.elements)


BENCH = Bench(
    name="langevin_eps",
    op=ops.langevin_eps,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes=EMD_SHAPES,
    written=("eps", "drift"),
    noises=noises,
)
