"""Finds and loads the compiled kernels of csrc/, at the first call of an op that needs them."""

from __future__ import annotations

import functools
import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from emd_fast.backends.reference.group_norm import layout

OPS = frozenset(
    {
        "group_norm",
        "group_norm_backward",
        "langevin_eps",
        "langevin_z",
        "m_step_loss",
        "m_step_loss_backward",
        "normal",
        "perturb",
        "score_matching_loss",
        "score_matching_loss_backward",
        "uniform",
    }
)
"""Ops with compiled kernels, for CPU and for CUDA tensors."""

# Ops whose CUDA kernels serve one layout, and the argument that has it.
_CHANNELS_LAST = {"group_norm": 0, "group_norm_backward": 1}

_FACTS = Path(__file__).resolve().parents[1] / "_build.json"  # written by setup.py


def why_not(op: str, device_type: str) -> str | None:
    """Reason (one line) why no compiled kernel serves `op` on this device type.

    None if one does.
    """
    if op not in OPS or device_type not in ("cpu", "cuda"):
        return "it does not have this op"
    module, reason = _load()
    if module is None or device_type == "cpu":
        return reason
    return None if module.cuda_version else str(_build()["cuda_reason"])


def depends_on_layout(op: str, device_type: str) -> bool:
    """Whether the compiled kernel of `op` serves tensors of some layouts only."""
    return device_type == "cuda" and op in _CHANNELS_LAST


def why_not_layout(op: str, args: Sequence[Any]) -> str | None:
    """Reason why the CUDA kernel of `op` does not serve these arguments. None if it does."""
    x: Tensor = args[_CHANNELS_LAST[op]]
    # With one position both layouts are equal.
    if layout(x) != torch.contiguous_format or x.numel() <= math.prod(x.shape[:2]):
        return None
    return f"it serves channels_last tensors only, got strides {tuple(x.stride())}"


def load() -> ModuleType:
    """Imports the compiled module emd_fast._C, which registers its kernels.

    Raises:
        RuntimeError: the module cannot be used here. The message gives the reason.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(f"the compiled kernels of emd_fast cannot be used: {reason}")
    return module


def is_loaded() -> bool:
    """Whether the compiled module can be used here. Loads it if so."""
    return _load()[0] is not None


def facts() -> dict[str, Any]:
    """Facts of the build and the instruction set in use; {"reason": ...} without a module."""
    module, reason = _load()
    if module is None:
        return {"reason": reason}
    return {
        "torch": module.torch_version,
        "compiler": module.compiler,
        "cuda": module.cuda_version,
        "build_type": module.build_type,
        "isas_built": list(module.isas_built),
        "isa": module.isa(),
    }


def _build() -> dict[str, str | None]:
    """Contents of the file that setup.py writes about the build. Empty if there was no build."""
    try:
        build: dict[str, str | None] = json.loads(_FACTS.read_text())
    except (OSError, ValueError):
        return {}
    return build


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The module, or None with the reason."""
    build = _build()
    if not build:
        return None, "not built: emd_fast was not installed (pip install --no-build-isolation -e .)"
    if build["reason"]:
        return None, build["reason"]
    # The C++ interface of torch is stable within a minor version only. A mismatch may crash
    # instead of failing to load.
    if _minor(str(build["torch"])) != _minor(torch.__version__):
        return None, f"built against torch {build['torch']}, running {torch.__version__}: install emd_fast again"
    try:
        module = importlib.import_module("emd_fast._C")
        module.isa()
    except (ImportError, RuntimeError) as error:
        return None, f"the compiled module does not load: {' '.join(str(error).split())}"
    return module, None


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
