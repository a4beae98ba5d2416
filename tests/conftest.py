from __future__ import annotations

import os

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

import emd_fast
from emd_fast import backends
from emd_fast.reporting import pictures

# Beside other workers a second thread finds no core, and waits for its share of one instead of computing.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    # Otherwise inductor starts a pool of processes, each of which imports torch, to hand C++ to a compiler.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch.set_num_threads(1)

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


# Under TRITON_INTERPRET=1 Triton serves CPU tensors too; tests/test_triton.py runs the tests of the ops so.
BACKENDS = ["reference", "cpu"]
if os.environ.get("TRITON_INTERPRET") == "1" and not backends.why_not("uniform", "triton", "cpu"):
    round_to_bfloat16_as_a_gpu_does()
    leave_what_is_masked_undefined()
    multiply_matrices_as_a_gpu_does()
    count_with_numbers()
    spend_less()
    BACKENDS.append("triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # So that at the end no worker sits alone with the longest.
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    """The test runs inside use_backend of each backend that CPU tensors have."""
    if request.param == "cpu" and (reason := native_missing()):
        pytest.skip(reason)
    with emd_fast.use_backend(request.param):
        yield request.param


@pytest.fixture
def without_pictures():
    """Runs draw no curves and no points, most of the time of one as small as here; what is yielded undoes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "curves", lambda *_: None)
        patch.setattr(pictures, "scatter", lambda *_: None)
        yield patch
