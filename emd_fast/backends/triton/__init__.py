"""Triton kernels for GPU tensors. Triton is imported at the first call that uses a kernel."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

OPS = frozenset(
    {
        "attention",
        "attention_backward",
        "geglu",
        "geglu_backward",
        "group_norm",
        "group_norm_backward",
        "langevin_eps",
        "langevin_z",
        "m_step_loss",
        "m_step_loss_backward",
        "normal",
        "perturb",
        "residual",
        "score_matching_loss",
        "score_matching_loss_backward",
        "uniform",
    }
)
"""Ops with a Triton kernel."""


def why_not(op: str, device_type: str) -> str | None:
    """Reason (one line) why no Triton kernel serves `op` on this device type. None if one does."""
    if op not in OPS:
        return "it does not have this op"
    if device_type not in ("cpu", "cuda"):
        return "it serves cuda tensors only"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # Triton reads this variable when a kernel is defined. Setting it later has no effect.
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "CPU tensors need TRITON_INTERPRET=1"
    return _triton_fails()


def implementation(op: str) -> Callable[..., Any]:
    """The function that computes `op`, with the signature of the reference function."""
    module = importlib.import_module(f"emd_fast.backends.triton.{op.removesuffix('_backward')}")
    function: Callable[..., Any] = getattr(module, op)
    return function


@functools.cache
def _triton_fails() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation may raise anything
        return f"Triton does not import: {' '.join(str(error).split())}"
    return None
