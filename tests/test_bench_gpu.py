"""What the bench does on a GPU: the clock on a simulated one, and kernels without their noise."""

import contextlib
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.harness import clock, command, machine, noiseless
from benchmarks.harness.declare import Case
from emd_fast import Noise, backends

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)


def run(words, **environment):
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment, timeout=300)


class Device:
    """A GPU whose time goes on by what runs on it, and on which a capture runs nothing."""

    def __init__(self):
        self.now, self.capturing, self.graphs, self.waits = 0.0, None, [], 0
        self.held = self.most = 0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        class CUDAGraph:
            def __init__(self):
                self.work = []
                device.graphs.append(self)

            def replay(self):
                assert device.capturing is None
                device.now += sum(self.work)

        @contextlib.contextmanager
        def capture(graph):
            device.capturing = graph
            try:
                yield
            finally:
                device.capturing = None

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        self.cuda = types.SimpleNamespace(
            Event=Event,
            CUDAGraph=CUDAGraph,
            graph=capture,
            device=lambda device: contextlib.nullcontext(),
            Stream=lambda: stream,
            stream=lambda stream: contextlib.nullcontext(),
            current_stream=lambda: stream,
            synchronize=self.wait,
            memory_allocated=lambda device: self.held,
            max_memory_allocated=lambda device: self.most,
            reset_peak_memory_stats=lambda device: self.take(0, forget=True),
        )

    def take(self, size, forget=False):
        self.held += size
        self.most = self.held if forget else max(self.most, self.held)

    def wait(self):
        assert self.capturing is None
        self.waits += 1

    def kernel(self, seconds):
        if self.capturing is not None:
            self.capturing.work.append(seconds)
        else:
            self.now += seconds


@pytest.fixture
def gpu(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch, "cuda", device.cuda)
    return device


@pytest.mark.parametrize("graph", [True, False])
def test_the_time_of_a_call_on_a_gpu(gpu, graph):
    slow, fast = [[lambda s=s: gpu.kernel(s)] * 3 for s in (1e-3, 1e-5)]
    taken, failed, _ = clock.measure({"slow": slow, "fast": fast, "slow again": slow}, GPU, rounds=5, graph=graph)
    assert not failed
    assert taken["slow"] == pytest.approx([1e-3] * 5) == taken["slow again"]
    assert taken["fast"] == pytest.approx([1e-5] * 5)
    if graph:
        assert [len(g.work) for g in gpu.graphs] == [3, 3, 201], "short calls are repeated, whole turns over the sets"


def test_a_contender_that_cannot_be_captured_is_reported(gpu):
    def waits():
        if gpu.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")

    taken, failed, peaks = clock.measure({"bad": [waits], "good": [lambda: gpu.kernel(1e-3)]}, GPU, rounds=2)
    assert list(taken) == ["good"] and "cannot be captured: operation not permitted" in failed["bad"]
    assert "--no-graph" in failed["bad"] and list(peaks) == ["good"]


@pytest.mark.parametrize("graph", [True, False])
def test_the_memory_of_a_call_on_a_gpu(gpu, graph):
    gpu.take(1000)

    def keeps(size, at_most):
        gpu.take(at_most)
        gpu.take(size - at_most)
        gpu.kernel(1e-2)
        gpu.take(-size)

    calls = {"large": [lambda: keeps(50, 700)], "small": [lambda: keeps(20, 30)]}
    calls["large again"] = calls["large"]
    assert clock.measure(calls, GPU, rounds=2, graph=graph).peaks == {"large": 700, "small": 30}


def test_nothing_waits_for_the_gpu_between_readings(gpu):
    calls = {name: [lambda: gpu.kernel(1e-2)] for name in "AB"}
    clock.measure(calls, GPU, rounds=2)
    few = gpu.waits
    gpu.waits = 0
    clock.measure(calls, GPU, rounds=50)
    assert gpu.waits == few


def test_sets_reach_beyond_the_cache_and_leave_room(gpu, monkeypatch):
    sizes = {"total_memory": 2**34, "multi_processor_count": 132, "L2_cache_size": 50 * 2**20}
    properties = types.SimpleNamespace(name="X", major=9, minor=0, uuid="1-2", **sizes)
    gpu.cuda.get_device_properties = lambda device: properties
    gpu.cuda.mem_get_info = lambda device: (2**33, 2**34)
    bench = benchmarks.load("langevin_eps")
    small, large = (Case(shape, "bf16", "nchw", GPU) for shape in ((64, 3, 64, 64), (4096, 4, 128, 128)))
    moved = bench.traffic(small).total
    sets = command._sets(bench, small, moved, warm=False)
    assert (sets - 1) * moved < 4 * properties.L2_cache_size <= sets * moved
    assert command._sets(bench, small, moved, warm=True) == 1
    assert command._sets(bench, large, bench.traffic(large).total, warm=False) == 2
    monkeypatch.setattr(machine, "_output", lambda *words: "1980 MHz, 2619 MHz" if "--id=GPU-1-2" in words else None)
    assert machine.clocks(GPU) == {"clocks.sm": "1980 MHz", "clocks.mem": "2619 MHz"}
    facts = machine.hardware(GPU)
    assert (facts["gpu"], facts["gpu_multiprocessors"], facts["gpu_l2_bytes"]) == ("X", 132, 50 * 2**20)


def test_nothing_is_set_on_the_device():
    code = "\n".join(path.read_text() for path in (ROOT / "benchmarks").rglob("*") if path.suffix in (".py", ".sh"))
    for setting in ("--lock-gpu-clocks", "-lgc", "--power-limit", "--persistence-mode", "--gpu-reset", "-mig"):
        assert setting not in code


triton = pytest.importorskip("triton", reason="Triton is not installed")


@pytest.mark.slow
def test_kernels_without_noise_are_verified_and_timed_under_the_interpreter():
    words = "perturb langevin_eps langevin_z langevin_step --shape 2,3,8,8 --dtype fp32 --device cpu --warm --rounds 1"
    words = ["bench", *words.split(), "--skip", "torch.compile", "--backend", "triton"]
    done = run([sys.executable, "-m", "emd_fast", *words], TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    for table in done.stdout.split("\n\n")[:4]:
        assert "emd_fast triton, no noise  " in table and "not timed: cannot" not in table, done.stdout


def test_kernels_without_noise_hold_no_philox(monkeypatch):
    from ahead_of_time import compiled, launches

    z, noise = torch.zeros(4, 3, 64, 64), Noise(0).state
    arguments = (z, z, 0.1, None, False, noise, 0)
    (drawing,) = launches("langevin_z", *arguments)
    noiseless_module = noiseless._noiseless_module("langevin_z")
    monkeypatch.setattr("emd_fast.backends.triton.implementation", lambda op: getattr(noiseless_module, op))
    (silent,) = launches("langevin_z", *arguments)
    with_noise, without = (compiled(launch, 90).count(r"mul\.wide\.u32") for launch in (drawing, silent))
    assert with_noise >= 20 and without == 0


def test_the_ops_keep_their_noise(monkeypatch):
    chosen, philox = backends.implementation, sys.modules.get("emd_fast.backends.triton.philox")
    noiseless.without_noise(benchmarks.load("langevin_z"))
    philox = philox or sys.modules["emd_fast.backends.triton.philox"]
    assert backends.implementation is chosen and philox.normals.fn.__name__ == "normals"
