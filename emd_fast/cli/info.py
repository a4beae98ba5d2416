"""The command `emd-fast info`: ops, backends and versions."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

import emd_fast


def info(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from emd_fast.backends import native

    report = emd_fast.backend_report()
    facts = {
        "emd_fast": emd_fast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: _found(name) for name in ("triton", "xformers", "diffusers", "sklearn")},
        "apex": _apex(),
        "native": native.facts(),
    }
    if options.json:
        print(json.dumps({**facts, "ops": report}, indent=1))
        return 0
    for name, value in facts.items():
        print(f"{name:12} {value}")
    print(f"\n{'op':22} {'cpu tensors':12} {'cuda tensors':12}")
    for op, by_device in report.items():
        print(f"{op:22} {by_device['cpu']['backend']:12} {by_device['cuda']['backend']:12}")
    reasons = {
        f"{device}: {row['reason']}"
        for by_device in report.values()
        for device, row in by_device.items()
        if row["reason"]
    }
    print("\nwhy not a faster backend:", *(sorted(reasons) or ["every op has its fastest"]), sep="\n  ")
    return 0


def _found(package: str) -> str:
    """Checks whether a package is installed, without importing it."""
    return "installed" if importlib.util.find_spec(package) else "not installed"


def _apex() -> str:
    """Recognises NVIDIA's apex by its files: the PyPI package named apex is another project."""
    found = importlib.util.find_spec("apex")
    if found is None:
        return "not installed"
    folders = [Path(folder) for folder in found.submodule_search_locations or []]
    nvidia = any((folder / "optimizers" / "fused_adam.py").exists() for folder in folders)
    return "NVIDIA's" if nvidia else "installed, but not NVIDIA's apex"
