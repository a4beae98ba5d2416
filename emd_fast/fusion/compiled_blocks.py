"""torch.compile of repeated blocks, with one compilation for all blocks of one structure.

What depends on time and condition alone is computed outside of the compiled code, where
conditioning_cache keeps it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.fusion.fused_class import STATE, Fused, is_a

logger = logging.getLogger("emd_fast")

RECOMPILE_LIMIT = 8
"""How often torch.compile compiles one function for other shapes, where nothing else is asked for."""


def run(module: Any, body: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Returns body(module, *args, **kwargs), compiled if `fuse(compile=...)` asked for it."""
    options = module.__dict__[STATE].get("compile")
    if options is None or torch.compiler.is_compiling():
        return body(module, *args, **kwargs)
    compiled = _compiled(body, module.__dict__[STATE]["structure"], torch.is_grad_enabled(), options)
    return compiled(module, *args, **kwargs)


def frozen_options(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The arguments of torch.compile as a hashable value."""
    return tuple(
        (name, tuple(sorted(value.items())) if name == "options" and value else value)
        for name, value in sorted(options.items())
    )


def structure(module: nn.Module) -> Hashable:
    """A key of plain values that is equal for blocks which can share compiled code."""
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
    import torch._dynamo.config as dynamo  # takes seconds, which a bare import must not
    from torch._dynamo.exc import FailOnRecompileLimitHit

    # Dynamo counts recompilations by code object, and stops at eight. A UNet has more sizes of
    # block than that, so each structure gets a code object of its own; with_gradients is among the
    # arguments for the same reason.
    code = body.__code__.replace()
    own = types.FunctionType(code, body.__globals__, body.__name__, body.__defaults__, body.__closure__)
    own.__kwdefaults__ = body.__kwdefaults__
    arguments: dict[str, Any] = {name: dict(value) if name == "options" else value for name, value in options}
    # PyTorch 2.11 has no argument for the limit.
    limit = arguments.pop("recompile_limit", None)
    limited = contextlib.nullcontext if limit is None else lambda: dynamo.patch(recompile_limit=limit)
    compiled = torch.compile(own, **arguments)
    first = True

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal first
        start = time.perf_counter()
        try:
            with limited():
                result = compiled(module, *args, **kwargs)
        except FailOnRecompileLimitHit:
            # Sizes are fixed, and pictures, evaluations and last batches bring others. What was
            # compiled stays.
            _say_once(type(module).__name__)
            return body(module, *args, **kwargs)
        if first:
            first = False
            seconds = time.perf_counter() - start
            what = "with" if with_gradients else "without"
            logger.info("compiled %s %s gradients in %.1f s", type(module).__name__, what, seconds)
        return result

    return call


@functools.cache
def _say_once(name: str) -> None:
    logger.warning("%s has been compiled for as many sizes as torch.compile allows: others run without it", name)


class Repeated(Fused):
    """A repeated block of an unknown kind, compiled as it is."""

    does = "repeated block, compiled"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return False  # by how often it is there: see repeated

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return run(self, self._emd_fast_base.forward, *args, **kwargs)


class ConditionedBlock(Repeated):
    """A block of emd_fast's EDM networks. The projection of its embedding is not compiled."""

    does = "residual block"

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = run(self, self._emd_fast_base.modulated, x, self.condition(embedded))
        return out


def conditioned(network: nn.Module) -> Iterator[nn.Module]:
    """Yields the blocks of emd_fast's EDM networks."""
    for module in network.modules():
        if any(is_a(module, name, "emd_fast.teachers.edm_networks.") for name in ("Block", "_Block")):
            yield module


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
