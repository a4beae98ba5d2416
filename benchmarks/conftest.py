"""Options and parametrization of `pytest benchmarks`."""

from __future__ import annotations

import pytest
import torch

import benchmarks
from benchmarks.harness import command
from benchmarks.harness.contenders import contenders_of
from benchmarks.harness.declare import DTYPES, LAYOUTS
from emd_fast.config import ConfigError


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("emd_fast")
    group.addoption("--shape", help="as 16,320,64,64 (default: the first of the op's table)")
    group.addoption("--dtype", choices=tuple(DTYPES))
    group.addoption("--layout", choices=tuple(LAYOUTS))
    group.addoption("--device")
    group.addoption("--skip", action="append", default=[], help="leave out a contender")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Creates one benchmark per op, pass and contender. Building contenders computes nothing."""
    option = metafunc.config.getoption
    device = command.device_named(option("--device"))
    shape = tuple(int(size) for size in option("--shape").split(",")) if option("--shape") else None
    found = []
    for name in benchmarks.OPS:
        bench = benchmarks.load(name)
        try:
            cases = bench.cases([shape or bench.shapes[device.type][0]], option("--dtype"), option("--layout"), device)
        except ConfigError:
            continue  # the op does not support this shape or layout
        for case in cases:
            contenders, _ = contenders_of(bench, case)
            found += [
                pytest.param(bench, case, contender, id=f"{name}-{case.passes}-{contender.name}".replace(" ", "_"))
                for contender in contenders
                if contender.name not in option("--skip")
            ]
    metafunc.parametrize(("bench", "case", "contender"), found)


@pytest.fixture(autouse=True, scope="module")
def compiled_code_is_dropped():
    yield
    torch.compiler.reset()
