"""Selection of the backend that computes an op, and `backend_report`."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from emd_fast.backends import attention_table, cudnn, native, reference, triton, xformers

NAMES = ("reference", "cpu", "triton", "cuda", "auto")
# Backends that "auto" tries for each device, fastest first.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


class _Active(threading.local):
    # Thread-local, and not a ContextVar: torch.compile reads and guards it, so that compiled code
    # follows use_backend as eager code does. Set in __init__, and not on the class: PyTorch 2.11
    # would read the class attribute, and later versions would miss an instance attribute added to
    # it.
    def __init__(self) -> None:
        self.name = "auto"


_active = _Active()


class use_backend:
    """Context manager: ops called inside use this backend, and so do their backward passes.

    It applies to the current thread. A backward pass may run on another.

    Args:
        name: "reference", "cpu", "triton", "cuda" or "auto". A named backend that cannot run a
            call raises RuntimeError at that call. "auto", the default, takes the fastest backend
            that can run it, and warns once when that is the reference.

    Raises:
        ValueError: an unknown name.
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
        self.name = name
        self.previous: list[str] = []  # a stack: one object may be entered repeatedly

    def __enter__(self) -> None:
        self.previous.append(_active.name)
        _active.name = self.name

    def __exit__(self, *exc: object) -> None:
        _active.name = self.previous.pop()


def active() -> str:
    """Name of the backend that `use_backend` has selected in this thread."""
    return _active.name


def why_not(op: str, backend: str, device_type: str) -> str | None:
    """Reason why `backend` cannot run `op` on tensors of this device type. None if it can."""
    if backend in ("reference", "sdpa"):
        return None
    if backend == "triton":
        return triton.why_not(op, device_type)
    if backend == "cudnn":
        return cudnn.why_not(device_type)
    if backend == "xformers":
        return xformers.why_not(device_type)
    if backend != device_type:
        return f"it serves {backend} tensors only"
    return native.why_not(op, device_type)


def require(op: str, backend: str, device_type: str) -> None:
    """Raises RuntimeError, with the reason, if this backend cannot run `op`."""
    if reason := why_not(op, backend, device_type):
        raise RuntimeError(f"backend {backend!r} cannot run {op} on {device_type} tensors: {reason}")


@functools.cache
def implementation(op: str, backend: str, device_type: str) -> Callable[..., Any]:
    """The function that computes `op`. It takes the arguments of the op's schema."""
    chosen = backend
    if backend == "auto":
        chosen = _fastest(op, device_type)
        if chosen == "reference" and op in native.OPS:
            _warn_once(device_type, _reasons(op, device_type))
    else:
        require(op, backend, device_type)
    if chosen == "reference":
        return reference.OPS[op]
    if chosen == "triton":
        return triton.implementation(op)
    native.load()
    run: Callable[..., Any] = getattr(torch.ops.emd_fast_native, op)
    if not native.depends_on_layout(op, device_type):
        return run
    others = functools.partial(_refused, op, device_type) if backend != "auto" else _beside_native(op, device_type)
    return functools.partial(_by_layout, op, run, others)


def _by_layout(op: str, run: Callable[..., Any], others: Callable[..., Any], *args: Any) -> Any:
    """Runs the compiled kernel where it serves the layout of the tensors, and `others` elsewhere."""
    return run(*args) if native.why_not_layout(op, args) is None else others(*args)


def _refused(op: str, device_type: str, *args: Any) -> Any:
    reason = native.why_not_layout(op, args)
    raise RuntimeError(f"backend {device_type!r} cannot run {op} on these tensors: {reason}")


def _beside_native(op: str, device_type: str) -> Callable[..., Any]:
    """The fastest implementation that serves every layout. Warns at a call that the reference serves."""
    if triton.why_not(op, device_type) is None:
        return triton.implementation(op)

    def run(*args: Any) -> Any:
        _warn_once(
            device_type,
            f"{device_type}: {native.why_not_layout(op, args)}; triton: {triton.why_not(op, device_type)}",
        )
        return reference.OPS[op](*args)

    return run


def backend_report() -> dict[str, dict[str, dict[str, str | None]]]:
    """Backend that serves each op on cpu and cuda tensors on this machine.

    Returns:
        report[op][device_type] = {"backend": name, "reason": why each faster backend cannot run
        the op, or None}.
    """
    by_backend: dict[str, dict[str, dict[str, str | None]]] = {
        op: {
            device_type: {"backend": _fastest(op, device_type), "reason": _reasons(op, device_type)}
            for device_type in _PREFERENCE
        }
        for op in sorted(reference.OPS)
        if not op.endswith("_backward") and op != "attention"
    }
    return {"attention": _attention_report(), **by_backend}


def for_attention(
    device: torch.device, head_dim: int, dtype: torch.dtype, tokens: int, keys: int, gradient: bool
) -> str:
    """Backend of attention under "auto": "sdpa" on a CPU, that of attention_table.py on a GPU."""
    if device.type != "cuda":
        return "sdpa"
    architecture = attention_table.architecture(device)
    return _or_sdpa(attention_table.choose(architecture, head_dim, dtype, tokens, keys, gradient))


# Evaluated at compile time: installed packages do not change, and the look-up cannot be traced.
@attention_table.constant_when_compiled
def _or_sdpa(chosen: str) -> str:
    if reason := why_not("attention", chosen, "cuda"):
        _warn_once_about_attention(chosen, reason)
        return "sdpa"
    return chosen


def _attention_report() -> dict[str, dict[str, str | None]]:
    here = attention_table.architecture(torch.device("cuda")) if torch.cuda.is_available() else None
    chosen = attention_table.backends(here)
    others = [backend for backend in ("cudnn", "triton", "xformers") if backend not in chosen]
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
    if _fastest(op, device_type) == device_type and native.depends_on_layout(op, device_type):
        other = "reference" if triton.why_not(op, device_type) else "triton"
        return f"{device_type}: it serves channels_last tensors only; {other} serves the others"
    faster = _order(device_type)[: _order(device_type).index(_fastest(op, device_type))]
    return "; ".join(f"{backend}: {why_not(op, backend, device_type)}" for backend in faster) or None


@functools.cache
def _warn_once(device_type: str, reasons: str | None) -> None:
    warnings.warn(
        f"emd_fast: {device_type} tensors are served by the reference backend ({reasons})", RuntimeWarning, stacklevel=4
    )


@functools.cache
def _warn_once_about_attention(chosen: str, reason: str) -> None:
    warnings.warn(f"emd_fast: attention is served by sdpa and not by {chosen} ({reason})", RuntimeWarning, stacklevel=5)
