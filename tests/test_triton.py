"""How the Triton kernels are chosen and launched. tests/interpreted tests what they compute."""

import importlib.util

import pytest
import torch

import emd_fast
from emd_fast import Noise, backends, ops

if importlib.util.find_spec("triton"):
    from emd_fast.backends.triton import launch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_who_is_served(monkeypatch):
    monkeypatch.setattr(backends.native, "why_not", lambda *_: "left out")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for op in backends.triton.OPS:
        assert backends.why_not(op, "triton", "cuda") is None
        assert "TRITON_INTERPRET=1" in backends.why_not(op, "triton", "cpu")
    assert backends.why_not("integers", "triton", "cuda") == "it does not have this op"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backends.why_not("normal", "triton", "cpu") is None
    report = emd_fast.backend_report()
    assert report["normal"]["cuda"]["backend"] == "triton" and report["integers"]["cuda"]["backend"] == "reference"
    assert report["normal"]["cpu"]["backend"] != "triton"  # the interpreter is no way to compute


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backends.native, "why_not", lambda *_: "left out")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for device_type in ("cpu", "cuda"):
        assert backends.why_not("normal", "triton", device_type) == "Triton is not installed"
    assert emd_fast.backend_report()["normal"]["cuda"]["backend"] == "reference"


def test_named_on_cpu_tensors_raises_with_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends.implementation.cache_clear()
    with emd_fast.use_backend("triton"), pytest.raises(RuntimeError, match="cannot run normal on cpu tensors: "):
        ops.normal((2, 3), Noise(0), stream=0)
    with emd_fast.use_backend("triton"), pytest.raises(RuntimeError, match="does not have this op"):
        ops.integers(5, (2, 3), Noise(0), stream=0)


@needs_triton
@pytest.mark.parametrize(
    ("shape", "given", "sizes", "collapsed"),
    [
        ((3, 8, 8), [(64, 8, 1)], (192,), [(1,)]),
        ((), [()], (1,), [(1,)]),
        ((1, 1), [(7, 9)], (1,), [(1,)]),
        ((5,), [(0,)], (5,), [(0,)]),
        ((3, 8, 8), [(64, 8, 1), (1, 24, 3)], (3, 64), [(64, 1), (1, 3)]),
        ((3, 1, 8), [(16, 99, 2)], (24,), [(2,)]),
        ((2, 3, 4), [(1, 2, 6), (12, 4, 1)], (2, 3, 4), [(1, 2, 6), (12, 4, 1)]),
    ],
)
def test_collapsed_dimensions(shape, given, sizes, collapsed):
    assert launch.collapse(shape, *given) == (sizes, collapsed)


@needs_triton
@pytest.mark.parametrize("sizes", [(1,), (3,), (784,), (12288,), (3, 4096), (320, 64), (7, 12), (7, 13), (2, 3, 5)])
def test_tiles_cover_every_sample_and_do_not_depend_on_the_batch(sizes):
    tiles = set()
    for batch in (1, 5, 1000):
        choice = launch.pick(batch, sizes)
        tiles.add((choice.rows, choice.columns, choice.down, choice.across))
        assert choice.columns % 8 == 0 and choice.rows & (choice.rows - 1) == 0
        if choice.planes:
            assert choice.rows * choice.down >= sizes[0] and choice.columns * choice.across >= sizes[1]
        else:
            assert choice.columns * choice.across >= torch.Size(sizes).numel()
            assert choice.programs * choice.rows >= batch * choice.across
    assert len(tiles) == 1


@needs_triton
def test_only_enormous_samples_count_in_64_bits():
    assert not launch.pick(2**20, (2**20,)).wide  # 2^40 elements: offsets have 64 bits anyway
    assert launch.pick(1, (2**31 - 1,)).wide and launch.pick(1, (2**16, 2**16)).wide
