"""Every contender of every op under pytest-benchmark: `pytest benchmarks -k langevin_eps`.

Contenders run one after the other, so a machine whose speed drifts distorts their ratios. GPU times
include launches. Use `emd-fast bench` for ratios.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.harness.declare import RandomTensors
from benchmarks.harness.verify import Verifier, call, with_gradients

SETS = 4


def test_speed(benchmark, bench, case, contender):
    verification = Verifier(bench, case).verify(contender)
    if verification.problem:
        (pytest.fail if verification.wrong else pytest.skip)(verification.problem)
    turn = itertools.cycle(
        [with_gradients(bench, case, bench.inputs(RandomTensors(case, seed))) for seed in range(SETS)]
    )

    def run() -> None:
        call(bench, case, contender, next(turn))
        if case.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{bench.name} {case.passes}"
    benchmark.extra_info |= {
        "shape": case.shape,
        "dtype": case.dtype,
        "layout": case.layout,
        "error": verification.error,
    }
    benchmark.extra_info |= {"bytes": bench.traffic(case).total}
    benchmark(run)
