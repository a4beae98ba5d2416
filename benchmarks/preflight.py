"""Checks that the parts of run_gpu.sh have what they need, before any of them runs.

    python benchmarks/preflight.py smoke e_step-sd15

Prints a line "PART: what is missing" for each thing that is missing. Exit code: 0 if nothing is
missing, 1 if some parts can run, 2 if none can. What is not installed is found without an import, so
that the answer takes less than a second then. It is run as a file, since the package benchmarks
imports emd_fast and PyTorch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_TESTS = ("pytest", "numpy", "hypothesis")
_BENCH = ("benchmarks.harness.command", "emd_fast.cli.commands")
_SD15 = ("diffusers", "huggingface_hub", "safetensors", "regex", "requests", "PIL")

MODULES: dict[str, tuple[str, ...]] = {
    "info": _BENCH,
    "build": ("setuptools",),
    "smoke": _TESTS,
    "test": _TESTS,
    "sanitize": _TESTS,
    "ops": (*_BENCH, "matplotlib"),
    "headline-kernels": _BENCH,
    "headline-adm": (*_BENCH, "benchmarks.e_step"),
    "headline-sd15": (*_BENCH, "benchmarks.e_step", *_SD15),
    "group_norm": (*_BENCH, "benchmarks.group_norm"),
    "attention": (*_BENCH, "benchmarks.attention"),
    "convolution": (*_BENCH, "benchmarks.convolution"),
    "residual_block": (*_BENCH, "benchmarks.residual_block"),
    "unet-adm": (*_BENCH, "benchmarks.unet", "benchmarks.loop"),
    "unet-sd15": (*_BENCH, "benchmarks.unet", "benchmarks.loop", *_SD15),
    "e_step-adm": (*_BENCH, "benchmarks.e_step"),
    "e_step-sd15": (*_BENCH, "benchmarks.e_step", *_SD15),
    "profile-adm": ("benchmarks.profile", "benchmarks.e_step"),
    "profile-sd15": ("benchmarks.profile", "benchmarks.e_step", *_SD15),
    "train": ("benchmarks.train",),  # trains adm and says that sd15 needs diffusers
    "study": ("emd_fast.cli.commands", "emd_fast.run.fashion_study", "tomli_w", "numpy", "matplotlib", "PIL"),
}
"""Modules that each part imports."""

PROGRAMS: dict[str, tuple[str, ...]] = {"sanitize": ("compute-sanitizer",), "build": ("cmake", "c++")}


def missing(part: str) -> list[str]:
    """Returns what a part lacks, a line each. Imports nothing."""
    modules = [name for name in MODULES[part] if not name.startswith(("benchmarks.", "emd_fast."))]
    found = [f"needs {name}, which is not installed" for name in modules if importlib.util.find_spec(name) is None]
    here = os.pathsep.join((os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)))
    if part == "build" and any((ROOT / "emd_fast").glob("_C*.so")):  # it is looked at before it is built again
        return []
    return found + [
        f"needs the program {name}, which is not on the PATH"
        for name in PROGRAMS.get(part, ())
        if shutil.which(name, path=here) is None
    ]


def broken(part: str) -> list[str]:
    """Imports what a part imports. Returns a line for each import that fails."""
    found = []
    for name in MODULES[part]:
        try:
            importlib.import_module(name)
        except Exception as error:  # a package of another version may raise anything
            found.append(f"cannot import {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return found


def unread(part: str) -> list[str]:
    """Reads the data of a part. Returns a line for what cannot be read."""
    if part != "study":
        return []
    from emd_fast.tasks import fashion_data

    try:
        for split in ("train", "test"):
            fashion_data.read(fashion_data.place_of(""), split)
    except fashion_data.BadData as error:
        return [f"needs Fashion-MNIST, DATA=FOLDER: {error}"]
    return []


def why_no_gpu() -> str | None:
    """Why PyTorch has no GPU here. None if it has one."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} has no PyTorch"
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} of {sys.executable} is built without CUDA"
    return None if torch.cuda.is_available() else f"{sys.executable} sees none through torch.cuda"


def main(parts: Sequence[str]) -> int:
    lacking = {part: missing(part) for part in parts}
    dry = os.environ.get("DRY") == "1"
    if all(lacking.values()):
        _print(lacking)
        return 2
    if not dry and (why := why_no_gpu()):
        _print(lacking)
        print(f"no GPU is here: {why}")
        return 2
    for part in parts:
        lacking[part] = lacking[part] or broken(part) or unread(part)
    _print(lacking)
    return 2 if all(lacking.values()) else 1 if any(lacking.values()) else 0


def _print(lacking: dict[str, list[str]]) -> None:
    for part, reasons in lacking.items():
        for reason in reasons:
            print(f"{part}: {reason}")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # in this folder, profile.py would be the standard library's
    sys.exit(main(sys.argv[1:]))
