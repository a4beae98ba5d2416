"""Comparison with an older run on the same machine; one regression beyond the noise fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.harness.record import TIMED, Record, Result, Row

SIGMAS = 4
FLOOR = 0.02  # relative; the smallest change that counts
_LOUD = 0.25  # margins above this are reported, since they hide real regressions
_SETTINGS = ("device", "threads", "warm", "graph")


def refusal(old: Record, hardware: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    """Returns why `old` cannot be compared with a run on this machine; None if it can."""
    differences = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for then, now, names in (
            (old.hardware, hardware, sorted(old.hardware.keys() | hardware.keys())),
            (old.settings, settings, _SETTINGS),
        )
        for name in names
        if then.get(name) != now.get(name)
    ]
    return f"cannot be compared with this run: {'; '.join(differences)}" if differences else None


def margin(old: Row, new: Row) -> float:
    """Returns the allowed relative increase of the median: SIGMAS times the combined noise."""
    return max(FLOOR, SIGMAS * math.hypot(old.noise or 0.0, new.noise or 0.0))


def regressions(old: Record, new: Record) -> tuple[list[str], list[str]]:
    """Returns regressions (slower, or no longer timed) of emd_fast contenders, and notes."""
    before = {result.key: result for result in old.results}
    found, notes = [], []
    for name in sorted(old.software.keys() | new.software.keys()):
        if old.software.get(name) != new.software.get(name):
            notes.append(f"{name} was {old.software.get(name)} and is {new.software.get(name)}")
    common = 0
    for result in new.results:
        if result.key not in before:
            notes.append(f"{result.title}: not in the older file")
            continue
        for then in _ours(before[result.key]):
            now = next((row for row in result.rows if row.contender == then.contender), None)
            if now is None and not any(row.ours for row in result.rows):
                continue
            common += 1
            if now is None or now.status != TIMED:
                found.append(f"{result.title}: {then.contender} is no longer timed ({now.why if now else 'absent'})")
                continue
            allowed = margin(then, now)
            if _ratio(then, now) > 1 + allowed:
                found.append(f"{_change(result, then, now)}, where noise allows {allowed:.1%}")
            elif _ratio(now, then) > 1 + allowed:
                notes.append(_change(result, then, now))
            elif allowed > _LOUD:
                notes.append(f"{result.title}: {then.contender}: noise hides changes up to {allowed:.0%}")
    if not common:
        found.append("the two files have no case in common: nothing was compared")
    return found, notes


def _ours(result: Result) -> list[Row]:
    return [row for row in result.rows if row.ours and row.status == TIMED]


def _change(result: Result, then: Row, now: Row) -> str:
    change = _ratio(then, now) - 1
    return f"{result.title}: {then.contender} took {_ms(then)} and takes {_ms(now)}: {change:+.1%}"


def _ratio(then: Row, now: Row) -> float:
    assert then.median and now.median
    return now.median / then.median


def _ms(row: Row) -> str:
    assert row.median is not None
    return f"{1e3 * row.median:.4g} ms"
