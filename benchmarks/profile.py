"""Kernel time of one E-step at K = 1, by class of kernel.

    python -m benchmarks.profile adm --batch 16 --json profile.json

Profiles one replay of the captured E-step with torch.profiler. "gaps" is the time between the first
and the last kernel in which none ran. Teacher and fake score run on two streams at small batches, so
the classes can add up to more than the whole. Not a module to run as a file: beside the others it
would take the place of the standard library's `profile`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import benchmarks
from benchmarks.harness import machine
from benchmarks.harness.command import device_named
from benchmarks.harness.declare import Case, RandomTensors
from emd_fast.config import ConfigError
from emd_fast.io.files import write_text


class Kernel(NamedTuple):
    """One kernel or copy: name, and start and end in microseconds."""

    name: str
    start: float
    end: float


CLASSES = ("convolution", "GEMM", "attention", "norm", "elementwise", "copy", "other")
# The first pattern that is found in the lower-case name decides.
_PATTERNS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        # Inductor names a kernel after the operations in it, and hands convolutions to cuDNN.
        ("GEMM", r"^triton_tem_"),
        ("norm", r"^triton_.*(group|layer)_norm"),
        ("elementwise", r"^triton_(poi|red|per|for)_"),
        # PyTorch's elementwise kernels have their operation in template arguments. A change of layout
        # for a convolution is a copy.
        ("copy", r"^memcpy|^memset|copy_kernel|catarray|nchwtonhwc|nhwctonchw|aten::(copy|cat|clone|stack)"),
        ("attention", r"flash|fmha|sdpa|attention|softmax|cudnn::fusion::(compute_dot|convert_dq)"),
        ("norm", r"group_?norm|layer_?norm|rowwisemoments|group_moments|fusedparams|internalgradients|gammabeta"),
        ("convolution", r"conv|fprop|dgrad|wgrad|winograd|implicit_gemm|im2col"),
        ("GEMM", r"gemm|gemv|nvjet|cublas|cutlass|splitk|xmma|aten::(add)?b?mm$"),
        ("elementwise", r"elementwise|reduce_kernel|multi_tensor|upsample|pool2d|aten::"),
        ("elementwise", r"emd::|langevin|perturb|normal|uniform|_loss|squares|mean|geglu|residual"),
    )
)


def kind_of(name: str) -> str:
    """Returns the class of a kernel by its name, one of CLASSES."""
    small = name.lower()
    return next((kind for kind, pattern in _PATTERNS if pattern.search(small)), "other")


def summary(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Returns microseconds by class, and of "gaps" and "whole"; counts are under "launches"."""
    found = dict.fromkeys(CLASSES, 0.0)
    busy, reached = 0.0, -float("inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        found[kind_of(kernel.name)] += kernel.end - kernel.start
        busy += max(0.0, kernel.end - max(kernel.start, reached))
        reached = max(reached, kernel.end)
    whole = reached - min(kernel.start for kernel in kernels) if kernels else 0.0
    return found | {"gaps": whole - busy, "whole": whole, "launches": float(len(kernels))}


def largest(kernels: Iterable[Kernel], count: int = 15) -> list[tuple[str, str, int, float]]:
    """Returns (class, name, launches, microseconds) of the kernels that take most time."""
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, []).append(kernel.end - kernel.start)
    rows = [(kind_of(name), name, len(times), sum(times)) for name, times in by_name.items()]
    return sorted(rows, key=lambda row: -row[3])[:count]


def traced(run: Callable[[], object], device: torch.device) -> list[Kernel]:
    """Returns the kernels of one call; on a CPU the operators, each with its own time alone."""
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    wanted = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        run()
        if gpu:
            torch.cuda.synchronize(device)
    kernels = []
    for event in profiler.events() or []:
        if event.device_type == wanted:
            start, end = event.time_range.start, event.time_range.end
            kernels.append(Kernel(event.name, start, end if gpu else start + event.self_cpu_time_total))
    return kernels


def profiled(network: str, batch: int, device: torch.device) -> list[Kernel]:
    bench = benchmarks.load(f"e_step:{network}")
    contender = bench.implementations(bench, device)["fused, graph" if device.type == "cuda" else "fused"]
    assert callable(contender)
    case = Case((batch, 1), bench.dtype[device.type], "nchw", device)
    arguments = bench.inputs(RandomTensors(case, 0)).arguments
    traced(lambda: torch.ones(1, device=device), device)  # starts the tracer, which must know of the graph
    for _ in range(3):  # captures, then replays
        contender(**arguments)
    return traced(lambda: contender(**arguments), device)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 1 if nothing was recorded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("network", choices=("small", "adm", "sd15"))
    parser.add_argument("--batch", type=int, help="samples (default: the first shape of e_step:NETWORK)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if present)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table, and all kernels by name")
    options = parser.parse_args(words)
    try:
        device = device_named(options.device)
        batch = options.batch or benchmarks.load(f"e_step:{options.network}").shapes[device.type][0][0]
        kernels = profiled(options.network, batch, device)
    except (ConfigError, RuntimeError) as error:
        print(f"profile: {error}", file=sys.stderr)
        return 2
    if not kernels:
        print("profile: torch.profiler recorded no kernel", file=sys.stderr)
        return 1
    table = summary(kernels)
    rows = largest(kernels)
    print(f"E-step of {options.network}, batch {batch}, K = 1: {table['launches']:.0f} launches")
    for name in (*CLASSES, "gaps", "whole"):
        print(f"  {name:12} {table[name] / 1e3:9.3f} ms {table[name] / table['whole']:5.0%}")
    for kind, name, count, taken in rows:
        print(f"  {taken / 1e3:9.3f} ms {count:5d} x {kind:11} {name[:100]}")
    if options.json:
        facts: dict[str, Any] = {"hardware": machine.hardware(device), "software": machine.software(device)}
        facts |= {"network": options.network, "batch": batch, "microseconds": table}
        write_text(options.json, json.dumps(facts | {"kernels": largest(kernels, len(kernels))}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
