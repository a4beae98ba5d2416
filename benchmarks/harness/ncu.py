"""Profiles one call of an op with Nsight Compute."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.harness import verify
from benchmarks.harness.contenders import Contender
from benchmarks.harness.declare import Bench, Case, RandomTensors

SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "LaunchStats",
    "Occupancy",
    "SchedulerStats",
    "WarpStateStats",
    "InstructionStats",
)


def command(bench: Bench, case: Case, backends: Sequence[str]) -> list[str]:
    """Returns the `ncu` command. It profiles one call and nothing before it."""
    words = ["bench", bench.name, "--shape", ",".join(map(str, case.shape)), "--dtype", case.dtype]
    words += ["--layout", case.layout] if bench.layouts else []
    words += [word for name in backends for word in ("--backend", name)]
    sections = [word for section in SECTIONS for word in ("--section", section)]
    # Clocks are not locked, since that would change a setting of the device.
    tool = ["ncu", "--profile-from-start", "off", "--clock-control", "none", *sections]
    return [*tool, sys.executable, "-m", "emd_fast", *words, "--device", "cuda", "--one-call"]


def run(words: Sequence[str]) -> int:
    """Prints the command and runs it.

    Raises:
        RuntimeError: ncu or a GPU is missing.
    """
    print(shlex.join(words), flush=True)
    missing = [] if shutil.which(words[0]) else [f"{words[0]} is not on the PATH"]
    missing += [] if torch.cuda.is_available() else ["no CUDA GPU is here"]
    if missing:
        raise RuntimeError(f"--ncu: {' and '.join(missing)}")
    return subprocess.run(list(words)).returncode


def one_call(bench: Bench, case: Case, contender: Contender) -> None:
    """Makes one call between cudaProfilerStart and cudaProfilerStop, after three warm-up calls."""
    inputs = verify.with_gradients(bench, case, bench.inputs(RandomTensors(case, 0)))
    for _ in range(3):
        verify.call(bench, case, contender, inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    verify.call(bench, case, contender, inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
