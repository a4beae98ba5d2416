"""Builds emd_fast/_C with CMake. Everything else about the package is in pyproject.toml.

EMD_FAST_BUILD chooses:
    auto (default)  build the CPU kernels, and the CUDA kernels if torch has CUDA and nvcc is
    found. If a
                    build fails, install without these kernels and report the reason here and at
                    run time
    cuda            build the CPU and the CUDA kernels; a failure is an error
    cpu             build the CPU kernels; a failure is an error
    none            install without compiled kernels

EMD_FAST_CUDA_ARCHITECTURES compiles the CUDA kernels for these chips alone, as CMake spells them:
90-real is an H100 or H200. The default is six chips, which takes about six times as long.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "cuda", "cpu", "none")
FACTS = "_build.json"  # beside the module, read by emd_fast/backends/native.py


class NotBuilt(Exception):
    """The extension cannot be built. The message is one line with the reason."""


def build_mode() -> str:
    mode = os.environ.get("EMD_FAST_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"EMD_FAST_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def torch_build() -> dict[str, str]:
    try:
        import torch
        from torch.utils.cpp_extension import include_paths
    except ImportError:
        sys.exit(
            "emd_fast: torch is not visible to the build. The kernels are compiled against your torch: install "
            "torch, setuptools, cmake and ninja first, then `pip install --no-build-isolation .`; or set "
            "EMD_FAST_BUILD=none to install without compiled kernels."
        )
    return {
        "EMD_TORCH_INCLUDE": ";".join(include_paths()),
        "EMD_TORCH_LIB": str(Path(torch.__file__).parent / "lib"),
        "EMD_TORCH_VERSION": str(torch.__version__),
    }


def tool(name: str) -> str | None:
    """Path of a program: that of the Python environment if present, else that of the system."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def cuda_build() -> dict[str, str]:
    """CMake definitions for the CUDA build.

    Raises:
        NotBuilt: torch has no CUDA, or no matching nvcc was found.
    """
    import torch

    if torch.version.cuda is None:
        raise NotBuilt(f"torch {torch.__version__} comes without CUDA")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    given = os.environ.get("CUDACXX") or (home and str(Path(home) / "bin" / "nvcc"))
    nvcc = given or shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    try:
        reported = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise NotBuilt("no nvcc was found (set CUDA_HOME)") from None
    version = re.search(r"release (\d+)\.", reported)
    if version is None or version[1] != torch.version.cuda.split(".")[0]:
        # The rule of torch's own extensions: minor versions are compatible, major versions are
        # not.
        raise NotBuilt(f"{nvcc} is not of CUDA {torch.version.cuda.split('.')[0]}, which torch was built with")
    chips = os.environ.get("EMD_FAST_CUDA_ARCHITECTURES")
    return {
        "EMD_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": str(nvcc),
        **({"CMAKE_CUDA_ARCHITECTURES": chips} if chips else {}),
    }


def first_error(output: str) -> str | None:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if line.startswith("CMake Error") and line.endswith(":"):  # the message follows
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


def compile_extension(source: Path, build: Path, output: Path, settings: dict[str, str]) -> None:
    cmake = tool("cmake")
    if cmake is None:
        raise NotBuilt("no cmake was found (pip install cmake ninja)")
    if not (os.environ.get("CXX") or any(map(shutil.which, ("c++", "g++", "clang++")))):
        raise NotBuilt("no C++ compiler was found")
    build.mkdir(parents=True, exist_ok=True)
    definitions = {
        "EMD_CUDA": "OFF",
        **settings,
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
        shutil.rmtree(build)  # otherwise CMake would cache the compiler that failed
        raise
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    run([cmake, "--build", str(build), "--parallel", jobs], "the compilation")
    if not output.exists():
        raise NotBuilt(f"the compilation did not write {output.name}")


def build_kernels(mode: str, output: Path) -> dict[str, str | None]:
    """Builds the kernels of this mode. Returns the facts of the build, for the run time."""
    facts: dict[str, str | None] = {"torch": None, "reason": None, "cuda_reason": None}
    if mode == "none":
        facts["reason"] = facts["cuda_reason"] = "not built: EMD_FAST_BUILD=none"
        return facts
    torch = torch_build()
    # The folder is kept, so that the next build compiles changed files only.
    build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch['EMD_TORCH_VERSION']}"
    if mode == "cpu":
        facts["cuda_reason"] = "not built: EMD_FAST_BUILD=cpu"
    else:
        try:
            cuda = cuda_build()
            # A folder for each choice of chips, since CMake would keep the choice of the last build.
            chips = re.sub(r"[^\w-]+", "-", cuda.get("CMAKE_CUDA_ARCHITECTURES", ""))
            folder = build.with_name("-".join(filter(None, (build.name, "cuda", chips))))
            compile_extension(ROOT, folder, output, {**torch, **cuda})
        except NotBuilt as why:
            if mode == "cuda":
                sys.exit(f"emd_fast: {why}")
            facts["cuda_reason"] = f"not built: {why}"
            print(f"emd_fast: building without CUDA kernels, which are {facts['cuda_reason']}", file=sys.stderr)
    if facts["cuda_reason"]:
        try:
            compile_extension(ROOT, build, output, torch)
        except NotBuilt as why:
            if mode == "cpu":
                sys.exit(f"emd_fast: {why}")
            facts["reason"] = facts["cuda_reason"] = f"not built: {why}"
            print(f"emd_fast: installing without compiled kernels, which are {facts['reason']}", file=sys.stderr)
    facts["torch"] = None if facts["reason"] else torch["EMD_TORCH_VERSION"]
    return facts


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        facts = build_kernels(build_mode(), output)
        if facts["reason"]:
            output.unlink(missing_ok=True)  # the module of an earlier build
        (output.parent / FACTS).write_text(json.dumps(facts))

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        package = ROOT / "emd_fast"
        for ext in self.extensions:
            output = Path(self.get_ext_fullpath(ext.name))  # in the source tree
            built = Path(self.build_lib) / "emd_fast"
            if not (built / output.name).exists():
                output.unlink(missing_ok=True)
            shutil.copyfile(built / FACTS, package / FACTS)


setup(ext_modules=[Extension("emd_fast._C", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
