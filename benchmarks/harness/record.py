"""JSON file of one run: results, hardware, software and settings."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emd_fast.config import ConfigError
from emd_fast.io.files import write_text

SCHEMA = 1
TIMED, WRONG, ABSENT = "timed", "wrong", "absent"


@dataclass(frozen=True)
class Row:
    """Result of one contender in one case. Times are seconds per call.

    Attributes:
        why: the reason if there is no timing.
        error, bound: error against float64 and its bound, of the result nearest to its bound.
        noise: relative noise of the median (emd_fast only).
        share: minimum bytes per second relative to the copy ceiling. Without a bytes model: FLOP/s
            relative to a dense matmul of the same dtype in the same run.
        peak_bytes: peak GPU memory of the calls (clock.Measurements).
    """

    contender: str
    ours: bool
    status: str
    why: str | None = None
    error: float | None = None
    bound: float | None = None
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    n: int = 0
    noise: float | None = None
    bytes_per_second: float | None = None
    share: float | None = None
    flops_per_second: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Result:
    """Results of one case.

    Attributes:
        sets: the number of input sets over which calls rotate.
        cold: whether all sets together are at least twice the last-level cache.
        yardstick: the contender that speed-ups are relative to.
    """

    op: str
    passes: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    bytes: float | None
    flops: float | None
    sets: int
    cold: bool
    yardstick: str
    rows: tuple[Row, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        return self.op, self.passes, self.shape, self.dtype, self.layout

    @property
    def title(self) -> str:
        return f"{self.op}, {self.passes}, {'x'.join(map(str, self.shape))}, {self.dtype}, {self.layout}"


@dataclass(frozen=True)
class Record:
    """One run. `ceiling` has the bytes per second (read and written) of a large copy in the run."""

    when: str
    hardware: dict[str, Any]
    software: dict[str, Any]
    clocks: dict[str, Any]
    commit: dict[str, Any]
    settings: dict[str, Any]
    ceiling: dict[str, Any]
    results: tuple[Result, ...]
    schema: int = SCHEMA


def write(path: Path, record: Record) -> None:
    write_text(path, json.dumps(dataclasses.asdict(record), indent=1) + "\n")


def read(path: Path) -> Record:
    """Reads a file.

    Raises:
        ConfigError: the file cannot be read or has another schema.
    """
    try:
        fields = json.loads(path.read_text())
        schema = fields["schema"]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not a file of emd-fast bench --json") from None
    if schema != SCHEMA:
        raise ConfigError(f"{path} has schema {schema}, this version reads {SCHEMA}")
    try:
        results = tuple(
            Result(**{**result, "shape": tuple(result["shape"]), "rows": tuple(Row(**row) for row in result["rows"])})
            for result in fields["results"]
        )
        return Record(**{**fields, "results": results})
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not a file of emd-fast bench --json: {error}") from None
