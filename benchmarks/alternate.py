"""Contenders timed in turn in one process, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def medians(
    contenders: Mapping[str, Callable[[], object]], rounds: int = 50, warmup: int = 5, calls: int = 1
) -> dict[str, float]:
    """Median seconds a call of each contender, over `rounds` rounds A B C A B C ... of `calls` calls each."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            for _ in range(calls):
                run()
            seconds[name].append((time.perf_counter() - began) / calls)
    return {name: statistics.median(times) for name, times in seconds.items()}


def table(title: str, times: Mapping[str, float], against: str) -> str:
    """The medians, and how many times faster than `against` each is."""
    lines = [title]
    lines += [f"  {name:24} {1e3 * t:9.3f} ms   {times[against] / t:6.2f}x" for name, t in times.items()]
    return "\n".join(lines)
