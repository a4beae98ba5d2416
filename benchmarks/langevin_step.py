"""The three ops of one Langevin step as em/e_step.py calls them, without the networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import langevin_eps, langevin_z
from benchmarks.harness.declare import EMD_SHAPES, Arguments, Bench, Case, Inputs, RandomTensors, Traffic
from emd_fast import Noise, ops
from emd_fast.backends import reference
from emd_fast.backends.reference.common import per_sample


def inputs(random: RandomTensors) -> Inputs:
    of_eps = langevin_eps.inputs(random).arguments
    gamma_eps, _ = of_eps.pop("step_size"), of_eps.pop("x")
    more = {"x0": random.network(), "z": random.state(), "z_grad": random.network()}
    return Inputs({**of_eps, **more, "gamma_eps": gamma_eps, "gamma_z": 0.01})


def op(
    eps: Tensor,
    drift: Tensor,
    z: Tensor,
    x0: Tensor,
    outputs: Sequence[Tensor],
    coefs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    z_grad: Tensor,
    *,
    gamma_eps: float,
    gamma_z: float,
    noise: Noise,
) -> tuple[Tensor, Tensor]:
    """Updates eps, drift and z in place; returns x_t (float32) and the cotangent."""
    x_t = ops.perturb(x0, alpha, sigma, eps=eps, dtype=torch.float32)
    cotangent = ops.langevin_eps(
        eps, drift, None, outputs, coefs, alpha, sigma, step_size=gamma_eps, noise=noise, cotangent_dtype=x0.dtype
    )
    ops.langevin_z(z, z_grad, step_size=gamma_z, noise=noise)
    return x_t, cotangent


def eager(
    eps: Tensor,
    drift: Tensor,
    z: Tensor,
    x0: Tensor,
    outputs: Sequence[Tensor],
    coefs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    z_grad: Tensor,
    *,
    gamma_eps: float,
    gamma_z: float,
    noise: Noise,
    n: Tensor | None = None,
    m: Tensor | None = None,
) -> tuple[Tensor, ...]:
    x_t = per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps
    eps, drift, cotangent = langevin_eps.eager(
        eps, drift, None, outputs, coefs, alpha, sigma, step_size=gamma_eps, noise=noise, n=n
    )
    z = langevin_z.eager(z, z_grad, step_size=gamma_z, noise=noise, m=m)
    return eps, drift, z, x_t, cotangent


def exact(
    eps: Tensor,
    drift: Tensor,
    z: Tensor,
    x0: Tensor,
    outputs: Sequence[Tensor],
    coefs: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    z_grad: Tensor,
    *,
    gamma_eps: float,
    gamma_z: float,
    noise: Noise,
) -> tuple[Tensor, ...]:
    x_t = reference.perturb(x0, alpha, sigma, eps, None, 0, 0, eps.dtype)
    eps, drift, cotangent = langevin_eps.exact(
        eps, drift, None, outputs, coefs, alpha, sigma, step_size=gamma_eps, noise=noise
    )
    return eps, drift, langevin_z.exact(z, z_grad, step_size=gamma_z, noise=noise), x_t, cotangent


def noises(arguments: Arguments) -> dict[str, Tensor]:
    return {**langevin_eps.noises(arguments), **langevin_z.noises(arguments)}


def traffic(case: Case) -> Traffic:
    parts = langevin_eps.traffic(case), langevin_z.traffic(case)
    # perturb takes eps here: it reads x0 and eps and writes x_t in float32.
    return Traffic(
        sum(part.read for part in parts) + (4 + case.width) * case.elements,
        sum(part.written for part in parts) + 4 * case.elements,
    )


BENCH = Bench(
    name="langevin_step",
    op=op,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes=EMD_SHAPES,
    written=("eps", "drift", "z"),
    noises=noises,
    ops=("perturb", "langevin_eps", "langevin_z"),
)
