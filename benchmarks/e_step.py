"""Whole E-step of K Langevin steps: plain PyTorch, tuned PyTorch (torch.compile), and emd_fast."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor

import emd_fast
from benchmarks.harness.declare import Arguments, Bench, Case, Function, Inputs, RandomTensors
from benchmarks.networks import VARIANTS, Networks, flops, networks
from emd_fast import Noise
from emd_fast.backends import reference
from emd_fast.diffusion.denoiser import column
from emd_fast.em.cuda_graph import GraphedEStep
from emd_fast.em.score_difference import ScoreDifference
from emd_fast.noise import NoiseStream

GAMMA_EPS, GAMMA_Z = 0.1, 0.01
STEPS = 8
# Time is linear in K, and two steps make a chain.
SHAPES = {"small": ((4, 2), (128, 2)), "adm": ((16, 2), (64, 2)), "sd15": ((4, 2), (16, 2))}


def bench(kind: str) -> Bench:
    """Returns the benchmark e_step:NETWORK."""

    def inputs(random: RandomTensors) -> Inputs:
        case = random.case
        made = networks(kind, case.device, case.dtype == "bf16")
        batch, steps = case.shape[0], case.shape[1] if len(case.shape) > 1 else STEPS
        return Inputs(
            {
                "networks": made,
                "z": random.normal(batch, *made.kind.sample_shape),
                "eps": random.normal(batch, *made.kind.sample_shape),
                "t": random.uniform(0.5, 2.0, batch),
                "cond": made.kind.condition(batch, case.device),
                "steps": steps,
                "noise": Noise(random.seed, device=case.device),
            }
        )

    def work(case: Case) -> float:
        # Three forward passes and one backward pass to the input, which costs as much as a forward pass.
        return 4 * (case.shape[1] if len(case.shape) > 1 else STEPS) * case.shape[0] * flops(kind)

    return Bench(
        name=f"e_step:{kind}",
        op=plain,
        inputs=inputs,
        eager=plain,
        exact=exact,
        traffic=None,
        shapes={"cpu": ((32, 8),), "cuda": SHAPES[kind]},
        axes=("B", "[K]"),
        noises=noises,
        flops=work,
        peers=peers,
        peers_draw="own",
        implementations=implementations,
        layouts=False,
        rotates=False,
        interleaves=False,
        verified=lambda case: dataclasses.replace(case, shape=_verified_shape(*case.shape)),
        captures=False,  # one contender of emd_fast and the tuned baseline are CUDA graphs themselves
        compiles=False,
        compiled=frozenset(
            {
                "torch.compile",
                "tuned baseline",
                "emd_fast fused, compiled",
                "emd_fast fused, compiled, graph",
            }
        ),
        dtype={"cpu": "fp32", "cuda": "bf16"},
        roundings=100,
    )


def _verified_shape(batch: int, steps: int = STEPS) -> tuple[int, int]:
    """Batch and K whose product is at most 4, since float64 is slow: two steps make a chain."""
    steps = min(steps, 2)
    return min(batch, 4 // steps), steps


def noises(arguments: Arguments) -> dict[str, Tensor]:
    size, state = list(arguments["z"].shape), arguments["noise"].state
    return {
        name: torch.stack([reference.normal(size, state, stream, k, torch.float32) for k in range(arguments["steps"])])
        for name, stream in (("n", NoiseStream.LANGEVIN_EPS), ("m", NoiseStream.LANGEVIN_Z))
    }


def plain(networks: Networks, n: Tensor | None = None, m: Tensor | None = None, **arguments: Any) -> tuple[Tensor, ...]:
    x = arguments["z"]
    with networks.precision(x):
        chain: Any = _chain
        result: tuple[Tensor, ...] = chain(*networks.in_dtype_of(x), n=n, m=m, **arguments)
    return result


def exact(networks: Networks, **arguments: Any) -> tuple[Tensor, ...]:
    return plain(networks, **noises(arguments), **arguments)


def _chain(
    generator: Any,
    teacher: Any,
    fake_score: Any,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Any,
    steps: int,
    noise: Noise,
    n: Tensor | None = None,
    m: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Computes the E-step as a user of PyTorch would write it."""
    t = t.float()
    alpha, sigma = (column(v, eps) for v in (teacher.schedule.alpha(t), teacher.schedule.sigma(t)))
    difference, drift = ScoreDifference(teacher, fake_score, t, cond, None, None), torch.zeros_like(eps)
    for k in range(steps):
        with torch.enable_grad():
            latent = z.detach().requires_grad_()
            x0 = generator(latent, cond)
        with torch.no_grad():
            delta = difference.at((alpha * x0 + sigma * eps).to(eps.dtype)).to(eps.dtype)
            kick = torch.randn_like(eps) if n is None else n[k]
            drift = (1 - GAMMA_EPS) * drift + GAMMA_EPS * sigma * delta
            eps = eps + GAMMA_EPS * (sigma * delta - eps) + (2 * GAMMA_EPS) ** 0.5 * kick
        (z_grad,) = torch.autograd.grad(x0, latent, (alpha * delta).to(x0.dtype))
        with torch.no_grad():
            kick = torch.randn_like(z) if m is None else m[k]
            z = z + GAMMA_Z * (z_grad - z) + (2 * GAMMA_Z) ** 0.5 * kick
    return z.detach(), eps, drift


def implementations(bench: Bench, device: torch.device) -> dict[str, Function | str]:
    settings: dict[str, Any] = {"gamma_eps": GAMMA_EPS, "gamma_z": GAMMA_Z}

    def of(variant: str) -> Function:
        def run(networks: Networks, **arguments: Any) -> tuple[Tensor, ...]:
            with networks.precision(arguments["z"]):
                ours: Any = emd_fast.e_step
                found = ours(*networks.fused(variant), **settings, **arguments)
            return found.z, found.eps, found.drift

        return run

    def graphed(variant: str) -> Function:
        def run(networks: Networks, steps: int, noise: Noise, **arguments: Any) -> tuple[Tensor, ...]:
            def make() -> GraphedEStep:
                return GraphedEStep(*networks.fused(variant), steps=steps, noise=noise, **settings)

            sample: Any = networks.cached(f"{variant} {steps} {id(noise)}", make)
            with networks.precision(arguments["z"]):
                found = sample(**arguments)
            return found.z, found.eps, found.drift

        return run

    none = "CUDA graphs need a GPU"
    return {
        **{variant: of(variant) for variant in VARIANTS},
        **{f"{variant}, graph": graphed(variant) if device.type == "cuda" else none for variant in VARIANTS},
    }


def peers(case: Case) -> dict[str, Function]:
    return {"tuned baseline": tuned, "torch.compile": compiled} if case.device.type == "cuda" else {}


def compiled(networks: Networks, n: Tensor | None = None, m: Tensor | None = None, **arguments: Any) -> Any:
    """Compiles the three networks by torch.compile in its default mode."""

    def make() -> tuple[Any, ...]:
        copies: Any = copy.deepcopy(networks.plain)
        return tuple(_bare_compiled(network) for network in copies)

    with networks.precision(arguments["z"]):
        chain: Any = _chain
        return chain(*networks.cached("torch.compile e_step", make), n=n, m=m, **arguments)


def tuned(networks: Networks, n: Tensor | None = None, m: Tensor | None = None, **arguments: Any) -> tuple[Tensor, ...]:
    """Uses torch.compile in mode max-autotune (with CUDA graphs), channels_last and bf16 weights."""

    def make() -> tuple[Any, ...]:
        copies: Any = copy.deepcopy(networks.plain)
        for network in copies:
            network.requires_grad_(False).to(memory_format=torch.channels_last)
            if networks.autocast:
                network.to(torch.bfloat16)
        return tuple(_bare_compiled(network, mode="max-autotune") for network in copies)

    # No autocast here: all computation is in the dtype of the weights.
    made: Any = networks.cached("tuned", make)
    chain: Any = _chain
    result: tuple[Tensor, ...] = chain(*made, n=n, m=m, **arguments)
    return result


def _bare_compiled(network: Any, **options: Any) -> Any:
    # Only the UNet is compiled. The preconditioning around it is a handful of operations.
    denoiser = getattr(network, "denoiser", network)
    denoiser.network.compile(dynamic=False, **options)
    return network
