"""Bound of a CUDA kernel by its machine code: instructions an element of its loops, and what limits it.

python -m benchmarks.issue group_norm 16,192,64,64                 NHWC, bfloat16, with SiLU
python -m benchmarks.issue group_norm_backward 16,192,64,64        to the input
    --dtype float32|float16|bfloat16, --no-silu, --arch 90

nvcc compiles the kernels for the chip; nothing runs. The bound is the largest of the times that
memory, the issue of instructions, MUFU, ALU, FP32 and shared memory need at their full rate on an
H200. A kernel can be slower than its bound and not faster. The ideal read reads every input once
and writes every output once.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import sass

ROOT = Path(__file__).resolve().parents[1]
GROUPS = 32
KERNELS = ("group_norm", "group_norm_backward")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MANGLED = {"float32": "If", "bfloat16": "INS_8Bfloat16E", "float16": "INS_7Float16E"}
# Flags of csrc/cuda/CMakeLists.txt.
_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fmad=false")


@dataclass(frozen=True)
class Chip:
    """Rates of a GPU. Lanes are results a clock and multiprocessor (CUDA C++ Programming Guide, 9.0)."""

    name: str = "H200"
    multiprocessors: int = 132
    clock: float = 1.98e9
    schedulers: int = 4
    lanes: Mapping[str, int] = ()  # type: ignore[assignment]
    shared: int = 128  # bytes a clock and multiprocessor
    memory: float = 4.1e12  # bytes a second that a copy reaches
    shared_of_block: int = 232448
    shared_of_multiprocessor: int = 233472


H200 = Chip(lanes={"fp32": 128, "imad": 64, "alu": 64, "mufu": 16, "memory": 32})


@dataclass(frozen=True)
class Tile:
    """What csrc/cuda/group_norm.h chooses for a call."""

    resident: bool
    blocks: int
    parts: int
    threads: int
    steps: int
    shared: int


@dataclass(frozen=True)
class HotLoop:
    """A loop over the tensor: what it does, and its instructions an element of x, by class."""

    does: str  # "copy", "sums" or "apply"
    per_element: Mapping[str, float]
    shared_bytes: float  # an element
    passes: float  # global reads and writes of a tensor of x's size
    length: int  # instructions of an iteration

    @property
    def instructions(self) -> float:
        return sum(self.per_element.values())


@dataclass(frozen=True)
class Bound:
    """Seconds that each resource needs at its full rate."""

    loops: tuple[HotLoop, ...]
    seconds: Mapping[str, float]
    ideal: float
    in_phases: float  # a bound that lets nothing overlap with what comes after a barrier
    outside: int  # instructions of the kernels outside of these loops, of which a thread runs a part

    @property
    def limit(self) -> str:
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def ratio(self) -> float:
        """The ideal read over the bound: 1 where nothing but one read and one write of memory limits."""
        return self.ideal / max(self.seconds.values())


def tool(name: str) -> str | None:
    """A program of the environment, of the system, of CUDA, or of Triton's package."""
    places = [str(Path(sys.executable).parent), None, "/usr/local/cuda/bin"]
    try:
        import triton

        places.append(str(Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin"))
    except ImportError:
        pass
    return next((found for place in places if (found := shutil.which(name, path=place))), None)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _needed(name: str) -> str:
    found = tool(name)
    if found is None:
        raise RuntimeError(f"{name} was not found: put CUDA's bin folder on the PATH")
    return found


def machine_code(kernel: str, arch: int, folder: Path) -> dict[str, tuple[sass.Instruction, ...]]:
    """The functions of csrc/cuda/`kernel`.cu, compiled for sm_`arch`."""
    cubin = folder / f"{kernel}.cubin"
    source = ROOT / "csrc" / "cuda" / f"{kernel}.cu"
    _run(_needed("nvcc"), *_FLAGS, f"-arch=sm_{arch}", "-cubin", "-o", str(cubin), str(source))
    return sass.functions(_run(_needed("cuobjdump"), "-sass", str(cubin)))


def tile(kernel: str, shape: Sequence[int], bytes_of: int, chip: Chip, folder: Path) -> Tile:
    """The tile of a call, from csrc/cuda/group_norm.h, which a C++ compiler translates."""
    channels, positions = shape[1], shape[2] * shape[3]
    arguments = (channels, channels // GROUPS, positions, bytes_of, 2 if "backward" in kernel else 1)
    program = folder / "tile.cpp"
    program.write_text(f"""
        #include <cstdio>
        #include "{ROOT / "csrc" / "cuda" / "group_norm.h"}"
        int main() {{
          const auto t = emd::cuda::norm_tile_for({", ".join(map(str, arguments))}, true,
                                                  {{{chip.shared_of_block}, {chip.shared_of_multiprocessor}, true}});
          std::printf("%d %u %u %u %u %u", t.resident, t.blocks, t.parts, t.threads(), t.steps(), t.shared);
        }}""")
    binary = folder / "tile"
    compiler = tool("c++") or _needed("g++")
    _run(compiler, "-std=c++20", "-o", str(binary), str(program))
    resident, *numbers = map(int, _run(str(binary)).split())
    return Tile(bool(resident), *numbers)


def hot_loops(code: tuple[sass.Instruction, ...], bytes_of: int, tensors: int) -> tuple[HotLoop, ...]:
    """The loops of a kernel that walk over the tensor, in the order of the code.

    They copy to shared memory, write the result, or read 16 bytes at a time with an FP32 instruction
    or more for each element. A loop that ends another one of its kind (the rest of an unrolled loop)
    handles fewer elements in an iteration, and is left out.
    """
    found: dict[str, tuple[float, HotLoop]] = {}
    for loop in sass.loops(code):
        copied, stored, loaded = loop.moved("LDGSTS"), _wide(loop, "STG"), _wide(loop, "LDG", "LDS")
        if copied:
            does, elements = "copy", copied / bytes_of / tensors
        elif stored:
            does, elements = "apply", stored / bytes_of
        elif loaded and loop.classes()["fp32"] >= loaded / bytes_of / tensors:
            does, elements = "sums", loaded / bytes_of / tensors
        else:
            continue
        moved = (copied or _wide(loop, "LDG")) + stored
        counted = {name: n / elements for name, n in loop.classes().items()}
        shared = (loop.moved("LDS", "STS") + copied) / elements
        hot = HotLoop(does, counted, shared, moved / elements / bytes_of, len(loop.instructions))
        # The first one of two that handle as many: the sums that only the gradient of `add` needs come last.
        if elements > found.get(does, (0.0, None))[0]:
            found[does] = (elements, hot)
    return tuple(hot for _, hot in found.values())


def _wide(loop: sass.Loop, *opcodes: str) -> int:
    return sum(i.bytes for i in loop.instructions if i.opcode in opcodes and i.bytes == 16)


def bound(
    kernel: str,
    shape: Sequence[int],
    *,
    dtype: str = "bfloat16",
    silu: bool = True,
    arch: int = 90,
    chip: Chip = H200,
    code: Mapping[str, tuple[sass.Instruction, ...]] | None = None,
) -> tuple[Tile, Bound]:
    """Bound of a call on a channels_last tensor with 32 groups.

    Args:
        kernel: one of KERNELS. The backward pass is that to the input.
        code: what `machine_code` returned, to compile once for several calls.

    Raises:
        RuntimeError: nvcc, cuobjdump or a C++ compiler is missing or fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        chosen = tile(kernel, shape, BYTES[dtype], chip, folder)
        code = machine_code(kernel, arch, folder) if code is None else code
    backward = kernel == "group_norm_backward"
    names = ["resident_gradient_kernel" if backward else "resident_kernel"] if chosen.resident else (
        ["sums_kernel", "gradient_kernel"] if backward else ["moments_kernel", "apply_kernel"]
    )  # fmt: skip
    tensors = 2 if backward else 1
    loops: list[HotLoop] = []
    outside = 0
    for kernel_name in names:
        flag = "" if kernel_name == "moments_kernel" else f"Lb{int(silu)}"
        pattern = re.compile(rf"\d{kernel_name}{MANGLED[dtype]}{flag}E")
        (function,) = (body for mangled, body in code.items() if pattern.search(mangled))
        hot = hot_loops(function, BYTES[dtype], tensors)
        loops += hot
        outside += len(function) - sum(loop.length for loop in hot)
    elements = shape[0] * shape[1] * shape[2] * shape[3]
    # The multiprocessor with most blocks decides: 256 blocks on 132 take as long as on 128. Memory does not care.
    blocks = shape[0] * chosen.blocks * chosen.parts
    busy = blocks / -(-blocks // chip.multiprocessors)
    all_of_it = _seconds(loops, elements, BYTES[dtype], busy, chip)
    phases = [[loop for loop in loops if (loop.does == "apply") == last] for last in (False, True)]
    in_phases = sum(max(_seconds(phase, elements, BYTES[dtype], busy, chip).values()) for phase in phases)
    ideal = (tensors + 1) * elements * BYTES[dtype] / chip.memory
    return chosen, Bound(tuple(loops), all_of_it, ideal, in_phases, outside)


def _seconds(loops: Sequence[HotLoop], elements: int, bytes_of: int, busy: float, chip: Chip) -> dict[str, float]:
    clocks = elements / (busy * chip.clock)
    seconds = {
        "memory": sum(loop.passes for loop in loops) * elements * bytes_of / chip.memory,
        "issue": sum(loop.instructions for loop in loops) / 32 / chip.schedulers * clocks,
        "shared memory": sum(loop.shared_bytes for loop in loops) / chip.shared * clocks,
    }
    for kind, lanes in chip.lanes.items():
        seconds[f"{kind} pipe"] = sum(loop.per_element.get(kind, 0.0) for loop in loops) / lanes * clocks
    return seconds


def report(kernel: str, shape: Sequence[int], chosen: Tile, found: Bound, chip: Chip = H200) -> str:
    size = "x".join(map(str, shape))
    how = f"resident, clusters of {chosen.parts}" if chosen.resident else f"streamed in {chosen.parts} parts"
    lines = [
        f"{kernel} {size} on {chip.name}, NHWC: {how}; {shape[0] * chosen.blocks * chosen.parts} blocks of "
        f"{chosen.threads} threads, {chosen.shared / 1024:.1f} KB, {chosen.steps} steps of a thread",
        "",
        "instructions an element " + "".join(f"{name:>9}" for name in (*sass.CLASSES, "all")),
    ]
    for loop in found.loops:
        numbers = [loop.per_element.get(name, 0.0) for name in sass.CLASSES] + [loop.instructions]
        lines.append(f"  {loop.does:<22}" + "".join(f"{n:9.2f}" for n in numbers))
    lines += ["", *(f"  {name:<14} {1e6 * s:8.2f} us" for name, s in found.seconds.items())]
    lines.append(
        f"bound {1e6 * max(found.seconds.values()):.2f} us ({found.limit}), ideal read {1e6 * found.ideal:.2f} us, "
    )
    lines[-1] += f"ideal over bound {found.ratio:.2f}; calculated, not measured"
    lines.append(f"without overlap of what a barrier separates {1e6 * found.in_phases:.2f} us")
    blocks = shape[0] * chosen.blocks * chosen.parts
    warps = -(-blocks // chip.multiprocessors) * chosen.threads / 32
    most = found.outside * warps / chip.schedulers / chip.clock
    lines.append(
        f"outside of the loops {found.outside} instructions, some for rare cases: {1e6 * most:.2f} us of issue at most"
    )
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.issue", description=__doc__.split("\n")[0])
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("shape", help="B,C,H,W; C a multiple of 32 groups", type=_shape)
    parser.add_argument("--dtype", choices=sorted(BYTES), default="bfloat16")
    parser.add_argument("--no-silu", action="store_true")
    parser.add_argument("--arch", type=int, default=90, help="90 for sm_90")
    given = parser.parse_args(words)
    try:
        found = bound(given.kernel, given.shape, dtype=given.dtype, silu=not given.no_silu, arch=given.arch)
    except RuntimeError as error:
        print(f"benchmarks.issue: {error}", file=sys.stderr)
        return 1
    print(report(given.kernel, given.shape, *found))
    return 0


def _shape(word: str) -> tuple[int, ...]:
    sizes = tuple(int(n) for n in word.split(",")) if re.fullmatch(r"\d+(,\d+){3}", word) else ()
    if len(sizes) != 4 or min(sizes) < 1 or sizes[1] % GROUPS:
        raise argparse.ArgumentTypeError(f"must be B,C,H,W with C a multiple of {GROUPS}, got {word!r}")
    return sizes


if __name__ == "__main__":
    sys.exit(main())
