"""Who takes part in a case: ours on each backend, eager PyTorch, torch.compile, peers, a function of the user's."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness.declare import Bench, Case, Function
from benchmarks.harness.noiseless import OPS as NOISELESS
from benchmarks.harness.noiseless import without_noise
from emd_fast.config import ConfigError

OURS = "emd_fast"


@dataclass(frozen=True)
class Contender:
    """One that computes the op.

    Attributes:
        in_place: updates what the op updates, and returns what the op returns; otherwise returns both, in that order.
        draws: whose noise it adds: that of the contract, its "own", or none.
    """

    name: str
    function: Function
    ours: bool = False
    in_place: bool = True
    draws: str = "contract"


def entrants(
    bench: Bench, case: Case, backends: Sequence[str] = (), against: Sequence[str] = (), skip: Sequence[str] = ()
) -> tuple[list[Contender], dict[str, str]]:
    """The contenders of a case, and why those that are missing are.

    Args:
        backends: of ours, these alone; all that serve here when empty.
        against: "module:function".
        skip: names to leave out.

    Raises:
        ConfigError: `against` names nothing. RuntimeError: a backend of `backends` cannot serve.
    """
    found, absent = [], {}
    served = bench.served(bench, case.device)
    for name in backends:
        if isinstance(reason := served.get(name, "it does not have this op"), str):
            raise RuntimeError(f"backend {name!r} cannot run {bench.name} on {case.device.type} tensors: {reason}")
    for name, function in served.items():
        if isinstance(function, str):
            absent[f"{OURS} {name}"] = function
        elif not backends or name in backends:
            found.append(Contender(f"{OURS} {name}", function, ours=True))
    triton = callable(served.get("triton")) and (not backends or "triton" in backends)
    if triton and NOISELESS.issuperset(bench.ops or (bench.name,)):
        found.append(Contender(f"{OURS} triton, no noise", without_noise(bench), draws="none"))
    found.append(Contender(bench.eager_name, bench.eager, in_place=False, draws="own"))
    if bench.compiles:
        # A shape that varies would be compiled for all shapes: each case gets code of its own.
        compiled = torch.compile(bench.eager, dynamic=False)
        found.append(Contender("torch.compile", compiled, in_place=False, draws="own"))
    found += [Contender(name, function, draws=bench.peers_draw) for name, function in bench.peers(case).items()]
    found += [Contender(name, imported(name)) for name in against]
    return [contender for contender in found if contender.name not in skip], absent


def imported(name: str) -> Function:
    """The function that "module:function" names.

    Raises:
        ConfigError: it is not there, or cannot be called.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"--against takes module:function, got {name!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's may raise anything
        raise ConfigError(f"--against {name}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not callable(function):
        raise ConfigError(f"--against {name} is not a function but {type(function).__name__}")
    return function
