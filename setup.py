"""Builds emd_fast/_C with CMake. Everything else about the package is in pyproject.toml.

EMD_FAST_BUILD chooses:
    auto (default)  build the CPU kernels; where that fails, install without them, and say why here and at run time
    cpu             build the CPU kernels; a failure is an error
    none            install without them
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cpu", "none")
FACTS = "_build.json"  # beside the module, read by emd_fast/backends/native.py


class NotBuilt(Exception):
    """The extension cannot be built; the message is one line that says why."""


def build_mode() -> str:
    mode = os.environ.get("EMD_FAST_BUILD", "auto")
    if mode == "cuda":
        sys.exit("EMD_FAST_BUILD=cuda: this version of emd_fast has no CUDA kernels; use auto, cpu or none")
    if mode not in MODES:
        sys.exit(f"EMD_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def torch_build() -> dict[str, str]:
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        sys.exit(
            "emd_fast: torch is not visible to the build. Its kernels are compiled against the torch you have: install "
            "torch, setuptools, cmake and ninja first, then `pip install --no-build-isolation .`; or set "
            "EMD_FAST_BUILD=none to install without compiled kernels."
        )
    return {
        "EMD_TORCH_INCLUDE": ";".join(include_paths()),
        "EMD_TORCH_LIB": str(Path(torch.__file__).parent / "lib"),
        "EMD_TORCH_VERSION": str(torch.__version__),
    }


def tool(name: str) -> str | None:
    """The program of the environment (a PyPI package may have brought it), else that of the system."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def first_error(output: str) -> str | None:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if line.startswith("CMake Error") and line.endswith(":"):  # what it has to say follows
            return " ".join(lines[i + 1 : i + 4])
        if "error" in line.lower():
            return line
    return None


def run(command: list[str], what: str) -> None:
    print(" ".join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise NotBuilt(f"{what} failed: {first_error(done.stdout) or f'exit code {done.returncode}'}")


def compile_extension(source: Path, build: Path, output: Path, torch: dict[str, str]) -> None:
    cmake = tool("cmake")
    if cmake is None:
        raise NotBuilt("no cmake was found (pip install cmake ninja)")
    if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        raise NotBuilt("no C++ compiler was found")
    build.mkdir(parents=True, exist_ok=True)
    definitions = {
        **torch,
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(output.parent),
    }
    ninja = tool("ninja")
    if ninja:
        definitions["CMAKE_MAKE_PROGRAM"] = ninja
    generator = ["-G", "Ninja" if ninja else "Unix Makefiles"]
    configure = [
        cmake,
        "-S",
        str(source),
        "-B",
        str(build),
        *generator,
        *(f"-D{k}={v}" for k, v in definitions.items()),
    ]
    try:
        run(configure, "the configuration by cmake")
    except NotBuilt:
        shutil.rmtree(build)  # or CMake would remember the compiler that did not work
        raise
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    run([cmake, "--build", str(build), "--parallel", jobs], "the compilation")
    if not output.exists():
        raise NotBuilt(f"the compilation did not write {output.name}")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        mode = build_mode()
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        facts = {"reason": None, "torch": None}
        if mode == "none":
            facts["reason"] = "not built: EMD_FAST_BUILD=none"
        else:
            torch = torch_build()
            try:
                # Kept between builds, so that the next one compiles only what has changed.
                build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch['EMD_TORCH_VERSION']}"
                compile_extension(ROOT, build, output, torch)
                facts["torch"] = torch["EMD_TORCH_VERSION"]
            except NotBuilt as why:
                if mode == "cpu":
                    sys.exit(f"emd_fast: {why}")
                facts["reason"] = f"not built: {why}"
                print(f"emd_fast: installing without compiled kernels, which are {facts['reason']}", file=sys.stderr)
        if facts["reason"]:
            output.unlink(missing_ok=True)  # of an earlier build
        (output.parent / FACTS).write_text(json.dumps(facts))

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        package = ROOT / "emd_fast"
        for ext in self.extensions:
            output = Path(self.get_ext_fullpath(ext.name))  # in the source here
            built = Path(self.build_lib) / "emd_fast"
            if not (built / output.name).exists():
                output.unlink(missing_ok=True)
            shutil.copyfile(built / FACTS, package / FACTS)


setup(ext_modules=[Extension("emd_fast._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
