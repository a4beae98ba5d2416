"""Tables for terminal and Markdown, and a bar chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.record import TIMED, WRONG, Record, Result, Row
from emd_fast.io.files import write_atomic

_HEADER = (
    "contender",
    "median",
    "quartiles",
    "speed-up",
    "GB/s",
    "of ceiling",
    "TFLOP/s",
    "peak MB",
    "error",
    "allowed",
)


def terminal(result: Result) -> str:
    """Returns the table of a case with aligned columns."""
    rows = _cells(result)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{result.title} ({_sets(result)})"]
    for row in rows:
        first, *rest = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  " + "  ".join((first, *rest)).rstrip())
    return "\n".join([*lines, *(f"  {row.contender}: {_why(row)}" for row in result.rows if row.status != TIMED)])


def line(row: Row) -> str:
    """Returns one contender in one line, for benchmarks whose table comes minutes later."""
    said = f"{_time(row.median)} (median of {row.n})" if row.median is not None else _why(row)
    return f"  {row.contender}: {said}"


def facts(record: Record) -> list[str]:
    """Returns lines about machine, versions and settings."""
    hardware, software, settings = record.hardware, record.software, record.settings
    where = f"{hardware['cpu']}, {hardware['cores']} cores, {settings['threads']} threads"
    if "gpu" in hardware:
        memory, l2 = hardware["gpu_memory_bytes"] / 2**30, hardware["gpu_l2_bytes"] / 2**20
        where = f"{hardware['gpu']}, {hardware['gpu_multiprocessors']} SMs, {memory:.0f} GiB, L2 {l2:.0f} MiB; {where}"
    versions = ", ".join(f"{name} {value}" for name, value in software.items() if value is not None)
    commit = record.commit["commit"] or "unknown"
    how = ["warm" if settings["warm"] else "cold", f"{settings['rounds']} rounds"]
    if settings["device"] == "cuda":
        how.append("graphs" if settings["graph"] else "launches")
    lines = [
        where,
        versions,
        f"commit {commit[:12]}{' with changes' if record.commit['dirty'] else ''}, {record.when}, {', '.join(how)}",
        f"copy ceiling {record.ceiling['bytes_per_second'] / 1e9:.1f} GB/s read and written",
    ]
    if clocks := record.clocks.get("after"):
        lines.append(", ".join(f"{name} {value}" for name, value in clocks.items()))
    return lines


def markdown(record: Record) -> str:
    """Returns facts and tables in Markdown."""
    parts = ["\n".join(f"- {line}" for line in facts(record))]
    for result in record.results:
        header, *rows = _cells(result)
        lines = [f"### {result.title}", "", f"{_sets(result)}.", ""]
        lines += [_piped(header), _piped(["---", *["---:"] * (len(header) - 1)]), *map(_piped, rows)]
        lines += ["", *(f"- {row.contender}: {_why(row)}" for row in result.rows if row.status != TIMED)]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def plot(path: Path, record: Record) -> None:
    """Writes a bar chart of medians with quartiles to a PNG; a line marks the memory-bound floor."""
    from matplotlib.figure import Figure

    panels = [(result, timed) for result in record.results if (timed := [r for r in result.rows if r.status == TIMED])]
    heights = [len(timed) + 1.5 for _, timed in panels] or [1.0]
    figure = Figure(figsize=(9, 0.32 * sum(heights) + 0.8), layout="constrained")
    figure.suptitle(record.hardware.get("gpu") or f"{record.hardware['cpu']}, {record.settings['threads']} threads")
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (result, timed) in zip(axes, panels, strict=False):
        medians = [1e3 * (row.median or 0) for row in timed]
        low = [m - 1e3 * (row.q1 or 0) for m, row in zip(medians, timed, strict=True)]
        high = [1e3 * (row.q3 or 0) - m for m, row in zip(medians, timed, strict=True)]
        colours = ["#1f5fa8" if row.ours else "#9a9a9a" for row in timed]
        panel.barh([row.contender for row in timed], medians, xerr=[low, high], color=colours, ecolor="#333333")
        if result.bytes is not None:
            floor = 1e3 * result.bytes / record.ceiling["bytes_per_second"]
            panel.axvline(floor, color="#d9722b", linestyle="--", linewidth=1)
        panel.invert_yaxis()
        panel.set_title(result.title, fontsize=9, loc="left")
        panel.set_xlabel("ms; dashed: memory-bound floor" if result.bytes is not None else "ms", fontsize=8)
        panel.tick_params(labelsize=8)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _cells(result: Result) -> list[list[str]]:
    """Returns header and rows without empty columns."""
    eager = next((row.median for row in result.rows if row.contender == result.yardstick), None)
    rows = [list(_HEADER)] + [_row(row, eager) for row in result.rows if row.status == TIMED]
    kept = [i for i in range(len(_HEADER)) if i == 0 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _row(row: Row, eager: float | None) -> list[str]:
    assert row.median is not None and row.q1 is not None and row.q3 is not None
    return [
        row.contender,
        _time(row.median),
        f"{_time(row.q1)} - {_time(row.q3)}",
        f"{eager / row.median:.2f}x" if eager else "",
        _number(row.bytes_per_second, 1e9),
        "" if row.share is None else f"{row.share:.0%}",
        _number(row.flops_per_second, 1e12),
        _number(row.peak_bytes, 1e6),
        "" if row.error is None else f"{row.error:.1e}",
        "" if row.bound is None else f"{row.bound:.1e}",
    ]


def _number(value: float | None, unit: float) -> str:
    return "" if value is None else f"{value / unit:.3g}" if value < 100 * unit else f"{value / unit:.0f}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3f} {unit}"
    return f"{seconds / 1e-6:.2f} us"


def _sets(result: Result) -> str:
    sets = "1 set" if result.sets == 1 else f"{result.sets} sets"
    return f"{sets} of inputs, {'cold' if result.cold else 'within the cache'}" if result.bytes else f"{sets} of inputs"


def _why(row: Row) -> str:
    return f"WRONG, not timed: {row.why}" if row.status == WRONG else f"not timed: {row.why}"


def _piped(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
