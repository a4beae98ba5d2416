from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch
from interpreter import (
    count_with_numbers,
    leave_what_is_masked_undefined,
    multiply_matrices_as_a_gpu_does,
    round_to_bfloat16_as_a_gpu_does,
    spend_less,
)
from spawned import Ranks

import emd_fast
from emd_fast import backends
from emd_fast.reporting import pictures

# Beside other workers a second thread finds no core, and waits for its share of one instead of computing.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    # Otherwise inductor starts a pool of processes, each of which imports torch, to hand C++ to a compiler.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)

# Inductor keys its cache on disk without ATen's instruction set, and loads code of another: NaN, or C++ that fails.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    os.path.join(tempfile.gettempdir(), f"emd_fast-inductor-{os.getuid()}-{torch.backends.cpu.get_cpu_capability()}"),
)

# Fixtures here only name a backend, which every example may share; and the first call of an op may load a library.
hypothesis.settings.register_profile(
    "emd_fast",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("emd_fast")


def native_missing() -> str | None:
    """Why the compiled CPU backend cannot serve here, or None."""
    served = emd_fast.backend_report()["normal"]["cpu"]
    return None if served["backend"] == "cpu" else served["reason"]


# Under TRITON_INTERPRET=1 the interpreter runs the Triton kernels on CPU tensors, and only those are tested: by the
# tests in tests/interpreted and, with "triton" as the only backend, by those of the ops that have a Triton kernel.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["reference", "cpu"]
if INTERPRETED:
    if reason := backends.why_not("uniform", "triton", "cpu"):
        raise pytest.UsageError(f"TRITON_INTERPRET=1, and the Triton kernels cannot be interpreted: {reason}")
    round_to_bfloat16_as_a_gpu_does()
    leave_what_is_masked_undefined()
    multiply_matrices_as_a_gpu_does()
    count_with_numbers()
    spend_less()
else:
    collect_ignore = ["interpreted"]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Under TRITON_INTERPRET=1 ignores the files that test no Triton kernel: each takes time to import."""
    if not INTERPRETED or collection_path.is_dir() or collection_path.parent.name == "interpreted":
        return None
    tests = {f"test_{name}.py" for name in ("noise", "kernels", *backends.triton.OPS)}
    return collection_path.name not in tests or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        others = [item for item in items if item.path.parent.name != "interpreted" and not on_triton(item)]
        items[:] = [item for item in items if item not in set(others)]
        config.hook.pytest_deselected(items=others)
    # The longest tests start first, so that no worker sits alone with them at the end.
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


def on_triton(item: pytest.Item) -> bool:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "triton" in (parameters.get("backend"), parameters.get("chosen"))


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    """The test runs inside use_backend of each backend that CPU tensors have."""
    if request.param == "cpu" and (reason := native_missing()):
        pytest.skip(reason)
    with emd_fast.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def ranks():
    """ranks(world, work, *arguments): what work returns on each of so many ranks, which all tests share."""
    groups: dict[int, Ranks] = {}

    def on(world, work, *arguments):
        if world not in groups:
            groups[world] = Ranks(world)
        return groups[world](work, *arguments)

    yield on
    for group in groups.values():
        group.close()


@pytest.fixture(scope="session")
def emulated():
    """The ops of emd_fast_native as the CUDA kernels compute them, on CPU tensors (tests/cuda_emulator)."""
    from cuda_objects import emulator

    backends.native.load()
    library = torch.library.Library("emd_fast_emulated", "DEF")
    for op in sorted(backends.native.OPS):
        library.define(str(getattr(torch.ops.emd_fast_native, op).default._schema).removeprefix("emd_fast_native::"))
    torch.ops.load_library(emulator())
    yield torch.ops.emd_fast_emulated
    library._destroy()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A process group of this process alone."""
    path = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def launched(monkeypatch):
    """The names of the Triton kernels that are launched, in order."""
    from emd_fast.backends.triton import launch

    names, submit = [], launch.submit
    monkeypatch.setattr(launch, "submit", lambda kernel, *args: (names.append(kernel.__name__), submit(kernel, *args)))
    return names


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """The command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    from emd_fast.cli import commands

    monkeypatch.chdir(tmp_path)

    def run(*words):
        try:
            code = commands.main([str(word) for word in words])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(call):
    """refused(exit code, what is said, *words): the command ends so, in one line on stderr."""

    def run(code, said, *words):
        got, _, err = call(*words)
        lines = [line for line in err.splitlines() if not re.match(r"\d+ images in ", line)]
        assert got == code and said in err and len(lines) == 1, err

    return run


@pytest.fixture
def without_pictures():
    """Runs draw no curves and no points, most of the time of one as small as here; what is yielded undoes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "curves", lambda *_: None)
        patch.setattr(pictures, "scatter", lambda *_: None)
        yield patch
