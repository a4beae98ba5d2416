"""fuse() in a plain PyTorch loop: one step of distribution matching distillation (arXiv 2311.18828).

The generator makes images. Teacher and fake score denoise them at a random noise level. The difference
of the two is the gradient of the images. The fake score is then trained to denoise the images. The
fused contenders differ by one call of fuse() per network. The learning rates are 0, so every call
finds the same weights.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import emd_fast
from benchmarks.harness.declare import Bench, Function, Inputs, RandomTensors
from benchmarks.networks import VARIANTS, Networks, flops, networks


class Loop:
    """Three networks and the optimizers of the generator and the fake score."""

    def __init__(self, made: Networks, x: Tensor, variant: str | None) -> None:
        self.generator, self.teacher, self.fake = copy.deepcopy(made.in_dtype_of(x))
        if variant is not None:
            for network in (self.generator, self.teacher, self.fake):
                emd_fast.fuse(network, **VARIANTS[variant])
        self.generator.requires_grad_(True)
        self.fake.requires_grad_(True)
        self.optimizers = [torch.optim.AdamW(net.parameters(), lr=0.0) for net in (self.generator, self.fake)]


def step(networks: Networks, z: Tensor, eps: Tensor, t: Tensor, cond: Any, variant: str | None = None) -> Any:
    """Returns the gradient of the images, the fake-score loss and the norms of both gradients."""
    key = f"loop {variant} {z.dtype == torch.float64}"
    loop: Loop = networks.cached(key, lambda: Loop(networks, z, variant))
    t, of_generator, of_fake = t.float(), *loop.optimizers
    sigma = t[:, None, None, None]
    with torch.enable_grad():
        with networks.precision(z):
            images = loop.generator(z, cond)
            with torch.no_grad():
                noised = (images.detach() + sigma * eps).to(z.dtype)
                real = loop.teacher.denoise(noised, t, cond)
                gradient = loop.fake.denoise(noised, t, cond) - real
        images.backward(gradient.to(images.dtype) / gradient[0].numel())
        norms = [_norm(loop.generator)]
        of_generator.step()
        of_generator.zero_grad()
        with networks.precision(z):
            denoised = loop.fake.denoise(noised, t, cond)
        loss = (denoised - images.detach().to(denoised.dtype)).square().mean()
        loss.backward()
        norms.append(_norm(loop.fake))
        of_fake.step()
        of_fake.zero_grad()
    return gradient, loss.detach(), torch.stack(norms)


def _norm(network: torch.nn.Module) -> Tensor:
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm()


def bench(kind: str) -> Bench:
    """Returns the benchmark loop:NETWORK."""

    def inputs(random: RandomTensors) -> Inputs:
        case = random.case
        made = networks(kind, case.device, case.dtype == "bf16")
        batch = case.shape[0]
        arguments = {name: random.normal(batch, *made.kind.sample_shape) for name in ("z", "eps")}
        t, cond = random.uniform(0.5, 2.0, batch), made.kind.condition(batch, case.device)
        return Inputs({"networks": made, **arguments, "t": t, "cond": cond})

    return Bench(
        name=f"loop:{kind}",
        op=step,
        inputs=inputs,
        eager=step,
        exact=step,
        traffic=None,
        shapes={"cpu": ((32,),), "cuda": ((8,),)},
        axes=("B",),
        # Two forward passes without gradient, and two with; a backward pass counts as two passes.
        flops=lambda case: 8 * case.shape[0] * flops(kind),
        implementations=implementations,
        layouts=False,
        rotates=False,
        captures=False,
        compiles=False,
        compiled=frozenset({"emd_fast fused, compiled"}),
        dtype={"cpu": "fp32", "cuda": "bf16"},
        roundings=100,
    )


def implementations(bench: Bench, device: torch.device) -> dict[str, Function | str]:
    def of(variant: str) -> Function:
        def run(**arguments: Any) -> Any:
            return step(**arguments, variant=variant)

        return run

    return {variant: of(variant) for variant in VARIANTS}
