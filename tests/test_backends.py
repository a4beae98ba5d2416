"""Who computes an op: the choice, its reach into the backward pass, and the report."""

import os
import threading
import warnings

import pytest
import torch
from conftest import native_missing

import emd_fast
from emd_fast import Noise, backends, ops
from emd_fast.backends import native, reference


@pytest.fixture
def served(monkeypatch):
    """The list of (op, backend as asked for) of every call that follows."""
    calls = []
    implementation = backends.implementation

    def record(op, backend, device_type):
        calls.append((op, backend))
        return implementation(op, backend, device_type)

    monkeypatch.setattr(backends, "implementation", record)
    return calls


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine where nothing was compiled."""
    monkeypatch.setattr(native, "why_not", lambda *_: "not built here")
    caches = (backends.implementation, backends._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def loss_inputs(batch=2):
    x = torch.randn(batch, 3, requires_grad=True)
    return x, (torch.ones(batch, 3), torch.rand(batch) + 0.1, torch.rand(batch) + 0.1, torch.ones(batch))


def test_native_is_there_where_it_must_be():
    reason = native_missing()
    if os.environ.get("EMD_FAST_REQUIRE_NATIVE") == "1":
        assert reason is None, f"EMD_FAST_REQUIRE_NATIVE=1, and the compiled CPU backend is missing: {reason}"
    elif reason:
        pytest.skip(reason)
    assert native.load().isa() in native.facts()["isas_built"]


@pytest.mark.parametrize("name", ["CPU", "", None, "numpy"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="backend"):
        emd_fast.use_backend(name)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "cuda", "auto"])
def test_every_name_of_the_design(name):
    with emd_fast.use_backend(name):
        assert backends.active() == name
    assert backends.active() == "auto"


def test_nested_blocks_and_exceptions_restore():
    with emd_fast.use_backend("reference"):
        with pytest.raises(KeyError), emd_fast.use_backend("triton"):
            raise KeyError
        assert backends.active() == "reference"
    assert backends.active() == "auto"


def test_one_instance_may_be_entered_twice():
    block = emd_fast.use_backend("reference")
    with block:
        with block:
            pass
        assert backends.active() == "reference"
    assert backends.active() == "auto"


def test_other_threads_choose_for_themselves():
    seen = []
    with emd_fast.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(backends.active()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


CALLS = {
    "uniform": lambda: ops.uniform((2, 3), Noise(0), stream=0),
    "normal": lambda: ops.normal((2, 3), Noise(0), stream=0),
    "integers": lambda: ops.integers(3, (2, 3), Noise(0), stream=0),
    "perturb": lambda: ops.perturb(torch.ones(2, 3), torch.ones(2), torch.ones(2), eps=torch.ones(2, 3)),
    "langevin_eps": lambda: ops.langevin_eps(
        torch.ones(2, 3), torch.ones(2, 3), None, [torch.ones(2, 3)], torch.ones(2, 1), torch.ones(2), torch.ones(2),
        step_size=0.1, noise=Noise(0),
    ),
    "langevin_z": lambda: ops.langevin_z(torch.ones(2, 3), torch.ones(2, 3), step_size=0.1, noise=Noise(0)),
    "m_step_loss": lambda: ops.m_step_loss(
        torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), torch.ones(2), torch.ones(2)
    ),
    "score_matching_loss": lambda: ops.score_matching_loss(
        torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), torch.ones(2), torch.ones(2), torch.ones(2)
    ),
    "group_norm": lambda: ops.group_norm(torch.ones(2, 4, 3), 2),
    "attention": lambda: ops.attention(*[torch.ones(1, 2, 1, 4)] * 3),
}  # fmt: skip


def test_every_op_is_called_here():
    assert set(CALLS) == set(ops.__all__)


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_named_backend_that_cannot_run_the_call_raises(op, name):
    with emd_fast.use_backend(name), pytest.raises(RuntimeError, match=rf"{name}.*{op}"):
        CALLS[op]()


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("name", ["reference", "auto"])
def test_the_reference_and_auto_run_every_op(op, name):
    with emd_fast.use_backend(name):
        CALLS[op]()


def test_named_cpu_without_the_compiled_module_raises_with_the_reason(without_native):
    with emd_fast.use_backend("cpu"), pytest.raises(RuntimeError, match="not built here"):
        CALLS["normal"]()


def test_auto_falls_back_and_says_so_once(without_native):
    with pytest.warns(RuntimeWarning, match="not built here"):
        x = CALLS["normal"]()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS["normal"]()
        CALLS["uniform"]()
        CALLS["integers"]()
    with emd_fast.use_backend("reference"):
        assert torch.equal(x, CALLS["normal"]())


def test_an_op_that_only_the_reference_has_is_no_reason_to_warn():
    if reason := native_missing():
        pytest.skip(reason)
    backends.implementation.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CALLS["integers"]()


def test_report_has_every_op_and_says_why_not_a_faster_one():
    report = emd_fast.backend_report()
    assert set(report) == set(ops.__all__)
    for op, row in report.items():
        assert set(row) == {"cpu", "cuda"}
        for device_type, entry in row.items():
            assert entry["backend"] and (entry["reason"] is None or entry["reason"].strip()), op
            if entry["backend"] == "reference":
                assert entry["reason"], f"{op} on {device_type}: served by the reference, and no reason"


def test_report_without_the_compiled_module(without_native):
    entry = emd_fast.backend_report()["langevin_eps"]["cpu"]
    assert entry["backend"] == "reference" and "not built here" in entry["reason"]


def test_backward_outside_the_block_uses_the_backend_of_the_forward(served, backend):
    x, rest = loss_inputs()
    y = ops.m_step_loss(x, *rest).sum()
    z = ops.score_matching_loss(x, torch.ones(2, 3), torch.ones(2, 3), *[torch.ones(2)] * 3).sum()
    w = ops.group_norm(x[:, :, None], 3).sum()
    with emd_fast.use_backend("cuda"):  # would raise
        torch.autograd.grad(y + z + w, x)
    assert {name for op, name in served} == {backend}
    assert [op for op, _ in served if op.endswith("backward")]


def test_backward_on_another_thread_uses_the_backend_of_the_forward(served, backend):
    x, rest = loss_inputs()
    loss = ops.m_step_loss(x, *rest).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert served == [("m_step_loss", backend), ("m_step_loss_backward", backend)]
    assert x.grad is not None


def test_meta_tensors_flow_through(backend):
    x = torch.empty(2, 4, 3, device="meta")
    one = torch.empty(2, device="meta")
    assert ops.group_norm(x, 2).device.type == "meta"
    assert ops.perturb(x, one, one, eps=x, dtype=torch.bfloat16).dtype == torch.bfloat16
    noise = Noise(0, device="meta")
    eps, drift = torch.empty_like(x), torch.empty_like(x)
    coefs = torch.empty(2, 2, device="meta")
    cotangent = ops.langevin_eps(eps, drift, x, [x], coefs, one, one, step_size=one, noise=noise)
    assert cotangent.shape == x.shape and cotangent.device.type == "meta"


def test_every_reference_has_its_name():
    for name, function in reference.OPS.items():
        assert function.__name__ == name
