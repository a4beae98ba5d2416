"""Contenders timed in turn, A B C A B C, so that a machine whose speed drifts slows all of them alike.

On the CPU: perf_counter around blocks of calls. On a GPU: CUDA events around the replay of a graph of calls, so that
the host and the gaps between launches do not count; or, with graph=False, around the calls themselves.
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

WARMUP = 3  # passes over the sets: compilation, caches, workspaces
_CPU_BLOCK, _GPU_BLOCK = 1e-3, 2e-3  # seconds that one reading should take at least
_MOST_CALLS = 4096

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, the quartiles, and how many readings there were."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, readings: Sequence[float]) -> Timing:
        quartiles = statistics.quantiles(readings, n=4, method="inclusive") if len(readings) > 1 else [readings[0]] * 3
        return cls(statistics.median(readings), quartiles[0], quartiles[2], len(readings))


class Readings(NamedTuple):
    """By contender: seconds of a call, one a round; why there are none; and on a GPU the bytes that its first calls
    took beyond what was allocated before them, at the most: activations and results, whether PyTorch's allocator
    gave them to a call or to a graph of calls. What its check has made before, weights above all, is not among them."""

    seconds: dict[str, list[float]]
    failed: dict[str, str]
    peaks: dict[str, int]


def readings(
    contenders: Mapping[str, Sequence[Call]], device: torch.device, rounds: int, graph: bool = True
) -> Readings:
    """Seconds a call, one reading a round, of each contender; why some could not be timed; what memory they took.

    Args:
        contenders: for each the same call on several sets of inputs, as many for all, which are taken in turn.
    """
    take = _on_gpu if device.type == "cuda" else _on_cpu
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall into somebody's reading
    try:
        return take(contenders, device, rounds, graph)
    finally:
        if collecting:
            gc.enable()


def _on_cpu(contenders: Mapping[str, Sequence[Call]], device: torch.device, rounds: int, graph: bool) -> Readings:
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
    # One turn for all: a set that one contender has just left in the cache must not be the next one's.
    turn = itertools.cycle(range(min(len(sets) for sets in contenders.values()))) if contenders else iter(())
    for _ in range(rounds):
        for name, sets in contenders.items():
            # The first call is not timed: it finds the allocator and the code as the one before has left them.
            first, *block = (sets[i] for i in itertools.islice(turn, 1 + calls[name]))
            first()
            began = time.perf_counter()
            for call in block:
                call()
            taken[name].append((time.perf_counter() - began) / len(block))
    return Readings(taken, {}, {})


def _on_gpu(contenders: Mapping[str, Sequence[Call]], device: torch.device, rounds: int, graph: bool) -> Readings:
    with torch.cuda.device(device):
        runs: dict[str, tuple[Call, int]] = {}
        failed: dict[str, str] = {}
        peaks: dict[str, int] = {}
        captured: dict[int, tuple[Call, int]] = {}  # the same calls under two names share a graph
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
        # Nothing waits for the GPU before the last round: it always has work queued, so that no launch is timed.
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
    return Readings(taken, failed, peaks)


def _replay(sets: Sequence[Call]) -> tuple[Call, int]:
    """A graph of enough calls, and how many."""
    once = _graph(sets, 1)
    each = _seconds(once.replay) / len(sets)
    repeats = math.ceil(_calls(_GPU_BLOCK, each) / len(sets))
    graph = once if repeats == 1 else _graph(sets, repeats)
    return graph.replay, repeats * len(sets)


def _graph(sets: Sequence[Call], repeats: int) -> torch.cuda.CUDAGraph:
    # Capturing needs what the first call allocates and compiles to be there, made on a stream other than the default.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in itertools.chain.from_iterable([sets] * WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The results of one pass over the sets are kept, so that no call writes to what the last one left in the cache.
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
    """Of one run on the GPU, the least of three."""
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


def noise(first: Sequence[float], second: Sequence[float]) -> float:
    """How far apart two medians of the same contender lie by chance, as a share: from its readings under two names.

    The larger of what was seen between the two medians and what the spread of their differences, round by round,
    makes of a median: two medians may be near each other by luck.
    """
    seen = abs(statistics.median(second) / statistics.median(first) - 1)
    differences = [b / a - 1 for a, b in zip(first, second, strict=True)]
    centre = statistics.median(differences)
    deviation = 1.4826 * statistics.median(abs(d - centre) for d in differences)
    return max(seen, 1.2533 * deviation / math.sqrt(len(differences)))
