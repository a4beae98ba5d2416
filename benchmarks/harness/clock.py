"""Interleaved timing of contenders (A B C A B C), so that drift of the machine affects all alike.

On a CPU, perf_counter measures blocks of calls. On a GPU, CUDA events measure the replay of a CUDA
graph of calls, which excludes launch overhead. With graph=False the events measure the calls.
"""

from __future__ import annotations

import collections
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

WARMUP = 3  # passes over the input sets: compilation, caches, workspaces
_CPU_BLOCK, _GPU_BLOCK = 1e-3, 2e-3  # minimum seconds of one reading
_MOST_CALLS = 4096

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, quartiles and number of readings."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, readings: Sequence[float]) -> Timing:
        quartiles = statistics.quantiles(readings, n=4, method="inclusive") if len(readings) > 1 else [readings[0]] * 3
        return cls(statistics.median(readings), quartiles[0], quartiles[2], len(readings))


class Measurements(NamedTuple):
    """Timings by contender.

    Attributes:
        seconds: seconds per call, one value per round.
        failed: the reason why a contender has no timing.
        peaks: on a GPU, peak bytes of the first calls beyond what was allocated before them. They
            include activations and results, and exclude weights, which exist already.
    """

    seconds: dict[str, list[float]]
    failed: dict[str, str]
    peaks: dict[str, int]


def measure(
    contenders: Mapping[str, Sequence[Call]], device: torch.device, rounds: int, graph: bool = True
) -> Measurements:
    """Times every contender once per round.

    Args:
        contenders: by name, the same call on several sets of inputs, equally many for all.
            Consecutive calls use consecutive sets.
        graph: on a GPU, time CUDA graphs instead of calls.
    """
    take = _on_gpu if device.type == "cuda" else _on_cpu
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would distort one reading
    try:
        return take(contenders, device, rounds, graph)
    finally:
        if collecting:
            gc.enable()


def _on_cpu(contenders: Mapping[str, Sequence[Call]], device: torch.device, rounds: int, graph: bool) -> Measurements:
    calls = {}
    for name, sets in contenders.items():
        for call in itertools.chain.from_iterable([sets] * WARMUP):
            call()
        began = time.perf_counter()
        for call in sets:
            call()
        each = (time.perf_counter() - began) / len(sets)
        calls[name] = _calls(_CPU_BLOCK, each)
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    # All contenders share one cycle over the sets, so that none finds its inputs in the cache because
    # the previous contender has just used them.
    turn = itertools.cycle(range(min(len(sets) for sets in contenders.values()))) if contenders else iter(())
    for _ in range(rounds):
        for name, sets in contenders.items():
            # The first call is not timed: allocator and caches are in the state of the previous contender.
            first, *block = (sets[i] for i in itertools.islice(turn, 1 + calls[name]))
            first()
            began = time.perf_counter()
            for call in block:
                call()
            taken[name].append((time.perf_counter() - began) / len(block))
    return Measurements(taken, {}, {})


def _on_gpu(contenders: Mapping[str, Sequence[Call]], device: torch.device, rounds: int, graph: bool) -> Measurements:
    with torch.cuda.device(device):
        runs: dict[str, tuple[Call, int]] = {}
        failed: dict[str, str] = {}
        peaks: dict[str, int] = {}
        captured: dict[int, tuple[Call, int]] = {}  # two names of the same calls share a graph
        for name, sets in contenders.items():
            try:
                if id(sets) not in captured:
                    torch.cuda.reset_peak_memory_stats(device)
                    before = torch.cuda.memory_allocated(device)
                    captured[id(sets)] = _replay(sets) if graph else _launches(sets)
                    peaks[name] = torch.cuda.max_memory_allocated(device) - before
                runs[name] = captured[id(sets)]
            except RuntimeError as error:
                torch.cuda.synchronize()
                failed[name] = f"cannot be captured: {' '.join(str(error).split())[:200]}; --no-graph times launches"
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        for run, _ in runs.values():
            run()
        # The host does not synchronise before the last round. The GPU always has queued work, so the
        # readings contain no launch latency.
        for _ in range(rounds):
            for name, (run, _) in runs.items():
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                run()
                end.record()
                events[name].append((start, end))
        torch.cuda.synchronize()
        taken = {
            name: [start.elapsed_time(end) / 1e3 / runs[name][1] for start, end in pairs]
            for name, pairs in events.items()
        }
    return Measurements(taken, failed, peaks)


def _replay(sets: Sequence[Call]) -> tuple[Call, int]:
    """Returns the replay of a CUDA graph of sufficiently many calls, and their number."""
    once = _graph(sets, 1)
    each = _seconds(once.replay) / len(sets)
    repeats = math.ceil(_calls(_GPU_BLOCK, each) / len(sets))
    graph = once if repeats == 1 else _graph(sets, repeats)
    return graph.replay, repeats * len(sets)


def _graph(sets: Sequence[Call], repeats: int) -> torch.cuda.CUDAGraph:
    # Allocation and compilation must precede the capture, on a stream other than the default one.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in itertools.chain.from_iterable([sets] * WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Keeping the results of one pass over the sets gives every call fresh output memory that is not
    # in the cache.
    kept: collections.deque[object] = collections.deque(maxlen=len(sets))
    with torch.cuda.graph(graph):
        for call in itertools.chain.from_iterable([sets] * repeats):
            kept.append(call())
    return graph


def _launches(sets: Sequence[Call]) -> tuple[Call, int]:
    def run(times: int) -> None:
        for call in itertools.chain.from_iterable([sets] * times):
            call()

    run(WARMUP)
    repeats = math.ceil(_calls(_GPU_BLOCK, _seconds(lambda: run(1)) / len(sets)) / len(sets))
    return lambda: run(repeats), repeats * len(sets)


def _seconds(run: Call) -> float:
    """Returns the seconds of one run on the GPU, the minimum of three."""
    least = math.inf
    for _ in range(3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        least = min(least, start.elapsed_time(end) / 1e3)
    return least


def _calls(block: float, each: float) -> int:
    return max(1, min(_MOST_CALLS, math.ceil(block / max(each, 1e-9))))


def timing_noise(first: Sequence[float], second: Sequence[float]) -> float:
    """Relative noise of a median, estimated from two series of readings of the same contender.

    Returns the larger of two numbers: the observed difference of the two medians, and the standard
    error of the median of the differences per round. The second one covers the case that the two
    medians agree by chance.
    """
    seen = abs(statistics.median(second) / statistics.median(first) - 1)
    differences = [b / a - 1 for a, b in zip(first, second, strict=True)]
    centre = statistics.median(differences)
    deviation = 1.4826 * statistics.median(abs(d - centre) for d in differences)
    return max(seen, 1.2533 * deviation / math.sqrt(len(differences)))
