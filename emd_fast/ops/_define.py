"""Definition of an op: its schema, and an implementation that dispatches to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emd_fast import backends

LIBRARY = torch.library.Library("emd_fast", "DEF")
# The same schemas without the argument `backend`. The compiled code of csrc/ implements them.
_NATIVE = torch.library.Library("emd_fast_native", "DEF")
# The same schemas again. Where compiled code overrides an op of emd_fast for CPU tensors, to skip
# the Python dispatch, it calls the op here for the other backends.
_FALLBACK = torch.library.Library("emd_fast_fallback", "DEF")


def define(name: str, arguments: str, returns: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines the op emd_fast::name(arguments, str backend) -> returns, and returns it.

    The backend is an argument of the op. So the choice of the forward pass reaches the backward
    pass, on any thread and through torch.compile. `fake` is called without that argument.
    """
    LIBRARY.define(f"{name}({arguments}, str backend) -> {returns}")
    _NATIVE.define(f"{name}({arguments}) -> {returns}")
    _FALLBACK.define(f"{name}({arguments}, str backend) -> {returns}")
    op = getattr(torch.ops.emd_fast, name).default
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]

    def run(*args: Any) -> Any:
        *given, backend = args
        result = backends.implementation(name, backend, _device_type(given))(*given)
        for i in written:
            if not given[i].is_inference():
                # Compiled kernels write without autograd's knowledge. The version counter tells it
                # that a saved tensor has changed.
                torch.autograd.graph.increment_version(given[i])
        return result

    for library in (LIBRARY, _FALLBACK):
        library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emd_fast::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY)
    return op


def differentiable(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Registers the autograd formula of emd_fast::name."""
    torch.library.register_autograd(f"emd_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def _device_type(args: Any) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
    raise AssertionError("an op without a tensor argument")
