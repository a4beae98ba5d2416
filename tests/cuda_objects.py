"""What nvcc makes of csrc/cuda for GPUs that are not here: what ptxas says of each kernel, machine code, PTX."""

import fcntl
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
TARGETS = (80, 86, 89, 90, 100, 120)


def tool(name: str) -> str | None:
    """A program of the environment or of the system; of Triton's package where it brings one."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin:
        beside = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(beside) if beside.exists() else None
    return found


def cmake(source: Path, build: Path, *definitions: str) -> str:
    """Configures and builds, and returns all that was said; fails with it."""
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"] if tool("ninja") else []
    said = ""
    for arguments in (
        ["-S", str(source), "-B", str(build), *generator, *definitions],
        ["--build", str(build), "--parallel", str(os.cpu_count())],
    ):
        command = [str(tool("cmake")), *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said += done.stdout
        assert done.returncode == 0, said[-10000:]
    return said


@dataclass(frozen=True)
class Kernel:
    name: str  # of the file, and of the template: "langevin_eps Body<2>"
    target: int
    registers: int
    stack: int
    spills: int


@dataclass(frozen=True)
class Objects:
    folder: Path
    kernels: tuple[Kernel, ...]

    @functools.cache  # noqa: B019 - one object a test run
    def machine_code(self, source: str) -> dict[int, dict[str, Counter[str]]]:
        """How often each instruction occurs in the kernels of a source file, by target and kernel."""
        pattern = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
        _, *parts = re.split(r"\barch = sm_(\d+)", self._disassembled(source, "-sass"))
        return {
            int(target): {name: Counter(pattern.findall(text)) for name, text in _by_kernel(r"Function : (\S+)", code)}
            for target, code in zip(parts[::2], parts[1::2], strict=True)
        }

    def ptx(self, source: str) -> dict[str, str]:
        """The PTX for chips to come, by kernel."""
        return dict(_by_kernel(r"\.entry (\S+)\(", self._disassembled(source, "-ptx")))

    def _disassembled(self, source: str, option: str) -> str:
        (file,) = self.folder.rglob(f"{source}.cu.o*")
        return subprocess.run([str(tool("cuobjdump")), option, str(file)], capture_output=True, text=True).stdout


def _by_kernel(start: str, code: str) -> list[tuple[str, str]]:
    _, *parts = re.split(start, code)
    return [(readable(name), text) for name, text in zip(parts[::2], parts[1::2], strict=True)]


def readable(mangled: str) -> str:
    if of_parts := re.search(r"parts_kernelINS_\d+(\w+?)E", mangled):
        return f"parts of {of_parts[1]}"
    source = re.search(r"GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}", mangled)
    if source and source[1].startswith("group_norm"):
        kernel, types = re.search(r"cu_[0-9a-f]{8}\d+(\w+?_kernel)(?:I(\S+?)E)?Ev?N", mangled).groups()
        return f"{source[1]} {kernel}" + (f"<{types}>" if types else "")
    of = re.search(r"(Body|Term|Gradient)I((?:L[bi]\d+E)+)E", mangled)
    group = re.search(r"EELi(\d+)EEE", mangled)
    if not source or not of:
        return mangled
    arguments = ", ".join(re.findall(r"L[bi](\d+)E", of[2]))
    return f"{source[1]} {of[1]}<{arguments}>" + (f" by {group[1]}" if group else "")


def compiled(folder: Path) -> Objects:
    """All of csrc/cuda, by the CMake project that needs nvcc alone: once for all processes that name this folder."""
    log = folder / "said.txt"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.exists():
            log.write_text(cmake(ROOT / "csrc" / "cuda", folder))
    said = log.read_text()
    pattern = (
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    kernels = tuple(
        Kernel(readable(name), int(target), int(registers), int(stack), int(stores) + int(loads))
        for name, target, stack, stores, loads, registers in re.findall(pattern, said, re.DOTALL)
    )
    return Objects(folder, kernels)


def torch_paths() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    library = Path(torch.__file__).parent / "lib"
    return [f"-DEMD_TORCH_INCLUDE={';'.join(include_paths())}", f"-DEMD_TORCH_LIB={library}"]


def emulator() -> Path:
    """The library of tests/cuda_emulator. It is kept, and the next run compiles what changed."""
    build = ROOT / "build" / f"cuda-emulator-torch{torch.__version__}"
    build.parent.mkdir(exist_ok=True)
    with open(f"{build}.lock", "w") as lock:  # another worker may be about to build it
        fcntl.flock(lock, fcntl.LOCK_EX)
        cmake(ROOT / "tests" / "cuda_emulator", build, *torch_paths())
    return build / "libemulated.so"
