"""Attention by xFormers, which is imported at the first call that uses it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

from torch import Tensor


def why_not(device_type: str) -> str | None:
    """Reason (one line) why xFormers cannot serve this device type. None if it can."""
    if device_type != "cuda":
        return "it serves cuda tensors only"
    return _ops()[1]


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention by xFormers on (B, tokens, heads, head_dim), its own layout. Differentiable.

    Raises:
        RuntimeError: xFormers has no kernel for this call.
    """
    try:
        result: Tensor = _ops()[0].memory_efficient_attention(q, k, v, scale=scale)
    except (NotImplementedError, ValueError) as error:
        call, reason = f"{tuple(q.shape)} {q.dtype}", " ".join(str(error).split())
        raise RuntimeError(f"backend 'xformers' cannot run attention on {call}: {reason}") from error
    return result


@functools.cache
def _ops() -> tuple[Any, str | None]:
    """The module xformers.ops, or None with the reason."""
    if importlib.util.find_spec("xformers") is None:
        return None, "xFormers is not installed"
    try:
        module = importlib.import_module("xformers.ops")
    except Exception as error:  # a build for another torch or CUDA may raise anything
        return None, f"xFormers does not import: {' '.join(str(error).split())}"
    if not hasattr(module, "memory_efficient_attention"):
        return None, "this xFormers has no memory_efficient_attention"
    return module, None
