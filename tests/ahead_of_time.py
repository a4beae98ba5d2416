"""Triton kernels compiled for GPUs that are not here: the launches of a call, and their compilation for a target."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under TRITON_INTERPRET=1 nothing is compiled", allow_module_level=True)

from emd_fast.backends import triton as backend
from emd_fast.backends.triton import launch

TARGETS = (80, 86, 89, 90, 100, 120)
SHARED = 99 * 1024  # what sm_86, sm_89 and sm_120 have


@dataclass(frozen=True)
class Submitted:
    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    options: dict[str, Any]


def launches(op: str, *args: Any) -> list[Submitted]:
    """The launches that this call of the op makes. Nothing runs."""
    found: list[Submitted] = []

    def submit(kernel, programs, args, constants, warps, device, options=launch.OPTIONS):
        found.append(Submitted(kernel, args, constants, warps, dict(options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "submit", submit)
        backend.implementation(op)(*args)
    return found


def specialised(value: Any, path: tuple[int, ...], fixed: bool, constants: dict, attributes: dict) -> Any:
    """The type of an argument as Triton's launcher has it: 1 becomes a constant, multiples of 16 are known as such."""
    if isinstance(value, tuple):
        return tuple(specialised(v, (*path, i), fixed, constants, attributes) for i, v in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1 and not fixed):
        constants[path] = value
        return "constexpr"
    aligned = (
        value.data_ptr() % 16 == 0 if isinstance(value, torch.Tensor) else isinstance(value, int) and value % 16 == 0
    )
    if aligned and not fixed:
        attributes[path] = [["tt.divisibility", 16]]
    if isinstance(value, torch.Tensor):
        names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
        return f"*{names[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@dataclass(frozen=True)
class Compiled:
    ptx: str
    cubin: bytes
    shared: int
    registers: int
    spills: int  # bytes, stored and loaded
    stack: int
    tensor_memory: int  # columns of it, which sm_100 has

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    def fused(self) -> tuple[int, list[str]]:
        """How many fused multiply-adds there are, and those without a number, in a register or not, as an operand."""
        numbers: set[str] = set()
        for register, operand in re.findall(r"mov\.b(?:32|64)\s+(%\w+), (.*?);", self.ptx):
            if all(part in numbers or re.match(r"0f|\d", part) for part in operand.strip("{}").split(", ")):
                numbers.add(register)
        found = re.findall(r"fma\.\S+\s+([^;]*);", self.ptx)
        free = [f for f in found if not any(o in numbers or o.startswith("0f") for o in f.split(", "))]
        return len(found), free

    def check(self, shared: int = SHARED, registers: int = 255) -> None:
        """No spills, no local memory, no 64-bit division, and no more of a processor than this."""
        assert self.spills == self.stack == 0, f"{self.spills} bytes spilt"
        assert self.shared <= shared and self.registers <= registers
        assert not self.count(r"\.local\.") and not self.count(r"(?:div|rem)\.[su]64")

    def sass(self) -> str:
        """The machine code, by the disassembler in Triton's package."""
        import triton.knobs

        with tempfile.TemporaryDirectory() as folder:
            binary = Path(folder, "kernel.cubin")
            binary.write_bytes(self.cubin)
            command = [triton.knobs.nvidia.cuobjdump.path, "-sass", str(binary)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout


_compiled: dict[tuple[Any, ...], Compiled] = {}


def compiled(submitted: Submitted, target: int) -> Compiled:
    """What was launched, compiled for sm_`target` with the options of the launch; equal launches are compiled once."""
    from triton.compiler import ASTSource

    kernel = submitted.kernel
    values = {**dict(zip(kernel.arg_names, submitted.args, strict=False)), **submitted.constants}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    signature = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            constants[(i,)], signature[parameter.name] = value, "constexpr"
        else:
            signature[parameter.name] = specialised(value, (i,), parameter.do_not_specialize, constants, attributes)
    source = ASTSource(kernel, signature, constants, attributes)
    key = (source.hash(), submitted.warps, str(submitted.options), target)
    if key not in _compiled:
        _compiled[key] = _compile(source, target, {"num_warps": submitted.warps, **submitted.options})
    return _compiled[key]


def _compile(source: Any, target: int, options: dict[str, Any]) -> Compiled:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend, get_ptxas

    said = ""

    def assembled(self, ptx, *_):
        """Triton's last stage, which keeps to itself what ptxas says."""
        nonlocal said
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.o")
        source.write_text(ptx)
        name = f"sm_{target}{'a' if target >= 90 else ''}"
        fusion = [] if options.get("enable_fp_fusion", True) else ["--fmad=false"]
        command = [get_ptxas(target).path, "-v", *fusion, f"--gpu-name={name}", str(source), "-o", str(binary)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        return binary.read_bytes()

    # In a cache of its own: another run would take these binaries for Triton's.
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope(), pytest.MonkeyPatch.context() as patch:
        knobs.cache.dir = folder
        patch.setattr(CUDABackend, "make_cubin", assembled)
        result = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return Compiled(
        *(result.asm["ptx"], result.asm["cubin"], result.metadata.shared),
        registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spills=sum(int(n) for n in re.findall(r"(\d+) bytes spill", said)),
        stack=sum(int(n) for n in re.findall(r"(\d+) bytes stack frame", said)),
        tensor_memory=getattr(result.metadata, "tmem_size", None) or 0,
    )
