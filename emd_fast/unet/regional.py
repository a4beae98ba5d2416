"""torch.compile of the blocks that a network repeats, one compilation for all blocks of one structure.

What depends on time and condition alone is computed outside of the compiled code, where conditioning_cache keeps it.
"""

from __future__ import annotations

import functools
import logging
import time
import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

from emd_fast.unet.fused import STATE, Fused

logger = logging.getLogger("emd_fast")


def run(module: Any, body: Callable[..., Any], *args: Any) -> Any:
    """body(module, *args), compiled where fuse() was asked for that."""
    options = module.__dict__[STATE].get("compile")
    if options is None or torch.compiler.is_compiling():
        return body(module, *args)
    return _compiled(body, module.__dict__[STATE]["structure"], torch.is_grad_enabled(), options)(module, *args)


def structure(module: nn.Module) -> Hashable:
    """Equal for blocks that can share compiled code. Plain values, so that it may be copied and pickled."""
    kind = type(module)
    tensors = (*module.named_parameters(), *module.named_buffers())
    plain = sorted(
        (k, v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k != "training"
    )
    return kind.__module__, kind.__qualname__, tuple(plain), tuple((name, tuple(t.shape)) for name, t in tensors)


@functools.cache
def _compiled(
    body: Callable[..., Any], structure: Hashable, with_gradients: bool, options: tuple[tuple[str, Any], ...]
) -> Callable[..., Any]:
    # Dynamo counts recompilations by code object, and stops at eight. A UNet has more sizes of block than that, so
    # each structure gets a code object of its own; with_gradients is among the arguments for the same reason.
    code = body.__code__.replace()
    own = types.FunctionType(code, body.__globals__, body.__name__, body.__defaults__, body.__closure__)
    # Sizes are fixed over a run, and kernels for fixed sizes are the faster ones.
    compiled = torch.compile(own, **{"fullgraph": True, "dynamic": False, **dict(options)})
    first = True

    def call(module: nn.Module, *args: Any) -> Any:
        nonlocal first
        if not first:
            return compiled(module, *args)
        start = time.perf_counter()
        result = compiled(module, *args)
        first = False
        seconds = time.perf_counter() - start
        what = "with" if with_gradients else "without"
        logger.info("compiled %s %s gradients in %.1f s", type(module).__name__, what, seconds)
        return result

    return call


class Repeated(Fused):
    """A block that a network repeats, of a kind that fuse() does not know otherwise: compiled as it is."""

    does = "repeated block, compiled"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return False  # by how often it is there: see repeated

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return run(self, _own_forward, args, kwargs)


def _own_forward(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return type(module)._emd_fast_base.forward(module, *args, **kwargs)


def repeated(network: nn.Module) -> list[nn.Module]:
    """The outermost modules of a class that a ModuleList of the network holds twice or more."""
    found: dict[int, nn.Module] = {}
    inside: set[int] = set()
    for module in network.modules():  # outer ones first
        if not isinstance(module, nn.ModuleList) or id(module) in inside:
            continue
        for block in module:
            if sum(type(other) is type(block) for other in module) > 1 and any(True for _ in block.children()):
                found[id(block)] = block
                inside.update(id(part) for part in block.modules())
    return list(found.values())
