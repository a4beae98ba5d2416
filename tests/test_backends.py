"""Who computes an op: the choice, its reach into the backward pass, and the report."""

import copy
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import native_missing
from test_bad_input import OPS as GOOD_CALLS

import emd_fast
from emd_fast import backends, ops
from emd_fast.backends import native


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


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "cuda", "auto"])
def test_blocks_nest_and_restore_after_exceptions(name):
    block = emd_fast.use_backend(name)
    with block:
        with pytest.raises(KeyError), emd_fast.use_backend("triton"):
            raise KeyError
        with block:  # one instance twice
            assert backends.active() == name
        assert backends.active() == name
    assert backends.active() == "auto"


def test_other_threads_choose_for_themselves():
    with emd_fast.use_backend("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(backends.active).result() == "auto"


def called(op):
    return getattr(ops, op)(**copy.deepcopy(GOOD_CALLS[op][0]))


@pytest.mark.parametrize("name", ["CPU", "", None, "numpy"])
def test_unknown_name(name):
    with pytest.raises(ValueError, match="backend"):
        emd_fast.use_backend(name)


@pytest.mark.parametrize("op", ops.__all__)
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_named_backend_that_cannot_run_the_call_raises(op, name):
    with emd_fast.use_backend(name), pytest.raises(RuntimeError, match=rf"{name}.*{op}"):
        called(op)


@pytest.mark.parametrize("op", ops.__all__)
@pytest.mark.parametrize("name", ["reference", "auto"])
def test_the_reference_and_auto_run_every_op(op, name):
    with emd_fast.use_backend(name):
        called(op)


def test_named_cpu_without_the_compiled_module_raises_with_the_reason(without_native):
    with emd_fast.use_backend("cpu"), pytest.raises(RuntimeError, match="not built here"):
        called("normal")


def test_auto_falls_back_and_says_so_once(without_native):
    with pytest.warns(RuntimeWarning, match="not built here"):
        x = called("normal")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called("normal")
        called("uniform")
        called("integers")
    with emd_fast.use_backend("reference"):
        assert torch.equal(x, called("normal"))


@pytest.fixture
def cuda_kernels(monkeypatch):
    """CPU tensors play CUDA tensors: the compiled kernels serve "cuda", and there is no Triton."""
    if reason := native_missing():
        pytest.skip(reason)
    monkeypatch.setattr(native, "why_not", lambda *_: None)
    monkeypatch.setattr(backends.triton, "why_not", lambda *_: "no Triton here")
    caches = (backends.implementation, backends._warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def norm_arguments(layout, positions=(3, 5)):
    x = torch.randn(2, 4, *positions).contiguous(memory_format=layout)
    return x, 2, None, None, 1e-5, None, None, None, True


@pytest.mark.parametrize("chosen", ["auto", "cuda"])
def test_the_cuda_kernels_of_group_norm_serve_channels_last(cuda_kernels, chosen, recwarn):
    run = backends.implementation("group_norm", chosen, "cuda")
    for arguments in (norm_arguments(torch.channels_last), norm_arguments(torch.contiguous_format, (1, 1))):
        x = arguments[0]
        y, mean, rstd = run(*arguments)
        for mine, its in zip((y, mean, rstd), torch.ops.emd_fast_native.group_norm(*arguments), strict=True):
            assert torch.equal(mine, its)
        backward = backends.implementation("group_norm_backward", chosen, "cuda")
        found = backward(y, x, mean, rstd, 2, *[None] * 5, True, [True] + [False] * 5)
        assert found[0].stride() == x.stride()
    assert not recwarn.list


def test_a_layout_that_the_cuda_kernels_do_not_serve(cuda_kernels):
    arguments = norm_arguments(torch.contiguous_format)
    with pytest.raises(RuntimeError, match=r"cuda.*group_norm.*channels_last"):
        backends.implementation("group_norm", "cuda", "cuda")(*arguments)
    run = backends.implementation("group_norm", "auto", "cuda")
    with pytest.warns(RuntimeWarning, match=r"channels_last.*no Triton here"):
        y = run(*arguments)[0]
    assert torch.equal(y, backends.reference.OPS["group_norm"](*arguments)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*arguments)
    row = emd_fast.backend_report()["group_norm"]["cuda"]
    assert row["backend"] == "cuda" and "reference serves the others" in row["reason"]


def test_triton_serves_the_other_layouts_where_it_is(cuda_kernels, monkeypatch):
    monkeypatch.setattr(backends.triton, "why_not", lambda *_: None)
    monkeypatch.setattr(backends.triton, "implementation", lambda op: lambda *_: f"{op} of Triton")
    assert backends.implementation("group_norm", "auto", "cuda")(*norm_arguments(torch.contiguous_format)) == (
        "group_norm of Triton"
    )


def test_an_op_that_only_the_reference_has_is_no_reason_to_warn():
    if reason := native_missing():
        pytest.skip(reason)
    backends.implementation.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        called("integers")


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
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert served == [("m_step_loss", backend), ("m_step_loss_backward", backend)]
    assert x.grad is not None
