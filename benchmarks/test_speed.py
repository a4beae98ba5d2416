"""Every contender of every op under pytest-benchmark, one after the other: `pytest benchmarks -k langevin_eps`.

Launches are part of the time on a GPU here, and a machine that drifts favours whom it pleases: ratios are those of
`emd-fast bench`.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.harness.declare import Draw
from benchmarks.harness.verify import Judge, called, ready

SETS = 4


def test_speed(benchmark, bench, case, contender):
    verdict = Judge(bench, case).verdict(contender)
    if verdict.problem:
        (pytest.fail if verdict.wrong else pytest.skip)(verdict.problem)
    turn = itertools.cycle([ready(bench, case, bench.inputs(Draw(case, seed))) for seed in range(SETS)])

    def run() -> None:
        called(bench, case, contender, next(turn))
        if case.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{bench.name} {case.passes}"
    benchmark.extra_info |= {"shape": case.shape, "dtype": case.dtype, "layout": case.layout, "error": verdict.error}
    benchmark.extra_info |= {"bytes": bench.traffic(case).total}
    benchmark(run)
