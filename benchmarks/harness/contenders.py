"""Contenders of a case: emd_fast per backend, eager PyTorch, torch.compile, peers, user functions."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.harness.declare import Bench, Case, Function
from benchmarks.harness.noiseless import OPS as NOISELESS
from benchmarks.harness.noiseless import without_noise
from emd_fast.backends import native
from emd_fast.config import ConfigError

OURS = "emd_fast"


@dataclass(frozen=True)
class Contender:
    """An implementation of the op.

    Attributes:
        ours: whether it is an implementation of emd_fast.
        in_place: True if it updates the same arguments as the op and returns what the op returns.
            False if it returns both, updated arguments first.
        draws: the noise that it uses: "contract", "own" (its own generator) or "none".
    """

    name: str
    function: Function
    ours: bool = False
    in_place: bool = True
    draws: str = "contract"


def contenders_of(
    bench: Bench,
    case: Case,
    backends: Sequence[str] = (),
    against: Sequence[str] = (),
    skip: Sequence[str] = (),
    compiled: bool = True,
) -> tuple[list[Contender], dict[str, str]]:
    """Returns the contenders of a case, and for each absent one the reason.

    Args:
        backends: the emd_fast backends to include; all available ones when empty.
        against: user functions as "module:function".
        skip: names of contenders to leave out.
        compiled: whether contenders that torch.compile makes take part; they compile for minutes.

    Raises:
        ConfigError: a name in `against` cannot be imported.
        RuntimeError: a backend of `backends` is not available.
    """
    found, absent = [], {}
    implementations = dict(bench.implementations(bench, case.device))
    if native.depends_on_layout(bench.name, case.device.type) and case.layout != "nhwc":
        implementations[case.device.type] = "it serves channels_last tensors only"
    for name in backends:
        if isinstance(reason := implementations.get(name, "it does not have this op"), str):
            raise RuntimeError(f"backend {name!r} cannot run {bench.name} on {case.device.type} tensors: {reason}")
    for name, given in implementations.items():
        if isinstance(given, str):
            absent[f"{OURS} {name}"] = given
        elif not backends or name in backends:
            found.append(Contender(f"{OURS} {name}", given, ours=True))
    triton = callable(implementations.get("triton")) and (not backends or "triton" in backends)
    if triton and NOISELESS.issuperset(bench.ops or (bench.name,)):
        found.append(Contender(f"{OURS} triton, no noise", without_noise(bench), draws="none"))
    found.append(Contender(bench.eager_name, bench.eager, in_place=False, draws="own"))
    if bench.compiles:
        # dynamic=False compiles for the shape of the case instead of for varying shapes.
        function = torch.compile(bench.eager, dynamic=False)
        found.append(Contender("torch.compile", function, in_place=False, draws="own"))
    found += [Contender(name, function, draws=bench.peers_draw) for name, function in bench.peers(case).items()]
    found += [Contender(name, imported(name)) for name in against]
    left_out = {*skip, *(() if compiled else bench.compiled)}
    return [contender for contender in found if contender.name not in left_out], absent


def imported(name: str) -> Function:
    """Imports "module:function".

    Raises:
        ConfigError: the import fails, or the object is not callable.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"--against takes module:function, got {name!r}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user module may raise anything
        raise ConfigError(f"--against {name}: {type(error).__name__}: {' '.join(str(error).split())}") from None
    if not callable(function):
        raise ConfigError(f"--against {name} is not a function but {type(function).__name__}")
    return function
