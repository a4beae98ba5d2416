"""Forward pass of a frozen teacher: eager, fused, and compiled by torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.declare import Bench, Case, Function, Inputs, RandomTensors
from benchmarks.networks import VARIANTS, Networks, flops, networks


def bench(kind: str) -> Bench:
    """Returns the benchmark unet:NETWORK."""

    def inputs(random: RandomTensors) -> Inputs:
        case = random.case
        made = networks(kind, case.device, case.dtype == "bf16")
        batch = case.shape[0]
        return Inputs(
            {
                "networks": made,
                "x": random.normal(batch, *made.kind.sample_shape),
                "t": random.uniform(0.5, 2.0, batch),
                "cond": made.kind.condition(batch, case.device),
            }
        )

    return Bench(
        name=f"unet:{kind}",
        op=eager,
        inputs=inputs,
        eager=eager,
        exact=eager,
        traffic=None,
        shapes={"cpu": ((32,),), "cuda": ((4,), (64,))},
        axes=("B",),
        flops=lambda case: case.shape[0] * flops(kind),
        peers=peers,
        implementations=implementations,
        layouts=False,
        rotates=False,
        compiles=False,
        compiled=frozenset({"torch.compile", "emd_fast fused, compiled"}),
        dtype={"cpu": "fp32", "cuda": "bf16"},
        roundings=100,
    )


def eager(networks: Networks, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    return _pass(networks, networks.in_dtype_of(x)[1], x, t, cond)


def _pass(networks: Networks, network: Any, x: Tensor, t: Tensor, cond: Any) -> Tensor:
    with torch.no_grad(), networks.precision(x):
        output: Tensor = network(x, t.float(), cond)
    return output.to(x.dtype)


def implementations(bench: Bench, device: torch.device) -> dict[str, Function | str]:
    def of(variant: str) -> Function:
        return lambda networks, x, t, cond: _pass(networks, networks.fused(variant)[1], x, t, cond)

    return {variant: of(variant) for variant in VARIANTS}


def peers(case: Case) -> dict[str, Function]:
    def compiled(networks: Networks, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        network = networks.cached("torch.compile", lambda: torch.compile(networks.plain[1], dynamic=False))
        return _pass(networks, network, x, t, cond)

    return {"torch.compile": compiled}
