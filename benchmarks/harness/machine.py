"""Facts about the machine: hardware, software, clocks, commit. Reads only; changes no setting."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import emd_fast

_ROOT = Path(__file__).resolve().parents[2]
_SYSTEM_CPUS = Path("/sys/devices/system/cpu")
_CLOCKS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
    "utilization.gpu",
)


def hardware(device: torch.device) -> dict[str, Any]:
    """Returns the facts that must be equal for two runs to be comparable."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": _cores(),
        "usable_cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_cache_bytes": _cpu_cache(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": gpu.name,
            "gpu_memory_bytes": gpu.total_memory,
            "gpu_capability": f"{gpu.major}.{gpu.minor}",
            "gpu_multiprocessors": gpu.multi_processor_count,
            "gpu_l2_bytes": gpu.L2_cache_size,
        }
    return facts


def software(device: torch.device) -> dict[str, Any]:
    return {
        "emd_fast": emd_fast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": (_nvidia_smi(device, ("driver_version",)) or {}).get("driver_version"),
        "os": platform.platform(),
    }


def clocks(device: torch.device) -> dict[str, str] | None:
    """Returns clocks, power and temperature of the GPU by nvidia-smi; None if unavailable."""
    return _nvidia_smi(device, _CLOCKS)


def commit() -> dict[str, Any]:
    """Returns commit and dirty flag; both None outside of a git checkout."""
    head = _output("git", "-C", str(_ROOT), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(_ROOT), "status", "--porcelain")
    return {"commit": head, "dirty": None if changes is None else bool(changes)}


def cache_bytes(device: torch.device) -> int:
    """Returns the size of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _cpu_cache() or 2**25


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int | None:
    """Returns the number of physical cores if known, otherwise of CPUs."""
    siblings = {
        path.read_text().strip()
        for path in _SYSTEM_CPUS.glob("cpu[0-9]*/topology/thread_siblings_list")
        if path.exists()
    }
    return len(siblings) or os.cpu_count()


def _cpu_cache() -> int:
    """Returns the bytes of the largest cache of one CPU; 0 if unknown."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [path.read_text().strip() for path in _SYSTEM_CPUS.glob("cpu0/cache/index*/size")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _nvidia_smi(device: torch.device, fields: tuple[str, ...]) -> dict[str, str] | None:
    if device.type != "cuda":
        return None
    # Selected by UUID, since nvidia-smi ignores CUDA_VISIBLE_DEVICES.
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    line = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={identity}")
    return None if line is None else dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
