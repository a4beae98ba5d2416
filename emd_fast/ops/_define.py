"""How an op is made: its schema, once, and the implementation that hands the call to a backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from emd_fast import backends

LIBRARY = torch.library.Library("emd_fast", "DEF")
# The same schemas without the choice of a backend, for the compiled code of csrc/ to implement.
_NATIVE = torch.library.Library("emd_fast_native", "DEF")
# The ops once more, for compiled code that serves them on CPU tensors without Python, and leaves other backends to it.
_CHOSEN = torch.library.Library("emd_fast_chosen", "DEF")


def define(name: str, arguments: str, returns: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines emd_fast::name(arguments, str backend) -> returns, and returns the callable op.

    The backend is an argument, so that the choice made in the forward pass reaches the backward pass, on any thread
    and through torch.compile. `fake` gets the arguments without it.
    """
    LIBRARY.define(f"{name}({arguments}, str backend) -> {returns}")
    _NATIVE.define(f"{name}({arguments}) -> {returns}")
    _CHOSEN.define(f"{name}({arguments}, str backend) -> {returns}")
    op = getattr(torch.ops.emd_fast, name).default
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.is_write]

    def run(*args: Any) -> Any:
        *given, backend = args
        result = backends.implementation(name, backend, _device_type(given))(*given)
        for i in written:
            if not given[i].is_inference():
                # Compiled kernels write past autograd, which must still notice that a tensor it saved has changed.
                torch.autograd.graph.increment_version(given[i])
        return result

    for library in (LIBRARY, _CHOSEN):
        library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emd_fast::{name}", lambda *args: fake(*args[:-1]), lib=LIBRARY)
    return op


def differentiable(name: str, setup_context: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Gives emd_fast::name its derivative."""
    torch.library.register_autograd(f"emd_fast::{name}", backward, setup_context=setup_context, lib=LIBRARY)


def _device_type(args: Any) -> str:
    for arg in args:
        if isinstance(arg, Tensor):
            return arg.device.type
    raise AssertionError("an op without a tensor argument")
