"""Who computes an op: the choice between the backends, and the report of it."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from emd_fast.backends import attention_table, native, reference, triton, xformers

NAMES = ("reference", "cpu", "triton", "cuda", "auto")
# Fastest first: what "auto" tries for tensors of a device.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


class _Active(threading.local):
    # A thread-local object and no ContextVar: torch.compile reads and guards this one, so that compiled code follows
    # use_backend as eager code does. And no attribute of the class: PyTorch 2.11 would read that one, later ones would
    # not notice when it gets one of its own.
    def __init__(self) -> None:
        self.name = "auto"


_active = _Active()


class use_backend:
    """Context manager: inside it, and in the backward of what ran inside it, ops use this backend in this thread.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "auto".

    A named backend that cannot run a call raises RuntimeError there; "auto" (the default) takes the fastest that can
    and warns once when that is the reference.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self.previous: list[str] = []  # one for each block that this object has open

    def __enter__(self) -> None:
        self.previous.append(_active.name)
        _active.name = self.name

    def __exit__(self, *exc: object) -> None:
        _active.name = self.previous.pop()


def active() -> str:
    """The backend asked for in this thread."""
    return _active.name


def why_not(op: str, backend: str, device_type: str) -> str | None:
    """None where `backend` can run `op` on tensors of this device type, otherwise the reason."""
    if backend in ("reference", "sdpa"):
        return None
    if backend == "triton":
        return triton.why_not(op, device_type)
    if backend == "xformers":
        return xformers.why_not(device_type)
    if backend != device_type:
        return f"it serves {backend} tensors only"
    return native.why_not(op, device_type)


def require(op: str, backend: str, device_type: str) -> None:
    """Raises RuntimeError where a backend that was asked for by name cannot run `op`, with the reason."""
    if reason := why_not(op, backend, device_type):
        raise RuntimeError(f"backend {backend!r} cannot run {op} on {device_type} tensors: {reason}")


@functools.cache
def implementation(op: str, backend: str, device_type: str) -> Callable[..., Any]:
    """The function that computes `op`, with the arguments of its schema."""
    if backend == "auto":
        backend = _fastest(op, device_type)
        if backend == "reference" and op in native.OPS:
            _say_once(device_type, _reasons(op, device_type))
    else:
        require(op, backend, device_type)
    if backend == "reference":
        return reference.OPS[op]
    if backend == "triton":
        return triton.implementation(op)
    native.load()
    return getattr(torch.ops.emd_fast_native, op)


def backend_report() -> dict[str, dict[str, dict[str, str | None]]]:
    """For every op, the backend that serves cpu and cuda tensors here, and why not a faster one.

    Returns:
        report[op][device_type] = {"backend": name, "reason": None or why each faster backend cannot serve}.
    """
    by_backend: dict[str, dict[str, dict[str, str | None]]] = {
        op: {
            device_type: {"backend": _fastest(op, device_type), "reason": _reasons(op, device_type)}
            for device_type in _PREFERENCE
        }
        for op in sorted(reference.OPS)
        if not op.endswith("_backward") and op != "attention"
    }
    return {"attention": _report_of_attention(), **by_backend}


def for_attention(
    device: torch.device, head_dim: int, dtype: torch.dtype, tokens: int, keys: int, gradient: bool
) -> str:
    """The backend of attention where none is named: it has backends besides those of every op, and a table of them."""
    if device.type != "cuda":
        return "sdpa"
    architecture = attention_table.architecture(device)
    return _or_sdpa(attention_table.choose(architecture, head_dim, dtype, tokens, keys, gradient))


@attention_table.constant_when_compiled  # what is installed does not change, and looking for it cannot be compiled
def _or_sdpa(chosen: str) -> str:
    if reason := why_not("attention", chosen, "cuda"):
        _say_once_of_attention(chosen, reason)
        return "sdpa"
    return chosen


def _report_of_attention() -> dict[str, dict[str, str | None]]:
    here = attention_table.architecture(torch.device("cuda")) if torch.cuda.is_available() else None
    chosen = attention_table.backends(here)
    others = [backend for backend in ("triton", "xformers") if backend not in chosen]
    reasons = [
        f"{backend}: {why_not('attention', backend, 'cuda') or 'serves by name; no row of attention_table.py has it'}"
        for backend in others
    ]
    return {
        "cpu": {"backend": "sdpa", "reason": None},
        "cuda": {"backend": " or ".join(chosen), "reason": "; ".join(reasons) or None},
    }


def _order(device_type: str) -> tuple[str, ...]:
    return _PREFERENCE.get(device_type, ("reference",))


def _fastest(op: str, device_type: str) -> str:
    return next(backend for backend in _order(device_type) if why_not(op, backend, device_type) is None)


def _reasons(op: str, device_type: str) -> str | None:
    faster = _order(device_type)[: _order(device_type).index(_fastest(op, device_type))]
    return "; ".join(f"{backend}: {why_not(op, backend, device_type)}" for backend in faster) or None


@functools.cache
def _say_once(device_type: str, reasons: str | None) -> None:
    warnings.warn(
        f"emd_fast: {device_type} tensors are served by the reference backend ({reasons})", RuntimeWarning, stacklevel=4
    )


@functools.cache
def _say_once_of_attention(chosen: str, reason: str) -> None:
    warnings.warn(f"emd_fast: attention is served by sdpa and not by {chosen} ({reason})", RuntimeWarning, stacklevel=5)
