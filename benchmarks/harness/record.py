"""One run as one JSON file: what was measured, on what, with what, how."""

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
    """A contender of a case. Seconds are of one call; `why` says why there are none.

    Attributes:
        error, bound: of the result nearest to its bound, against float64.
        noise: how far two medians of it lie apart by chance, as a share (ours alone).
        share: of the copy ceiling, by the bytes that cannot be avoided; where there is no such number, of the rate of a
            dense product of matrices of the case's dtype, measured in the same run.
        peak_bytes: of GPU memory that its calls took beyond what was there before, at the most (clock.Readings).
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
    """A case. `sets`: of inputs, taken in turn; `cold`: together they are at least twice the last cache;
    `yardstick`: the contender that speed-ups are over."""

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
    """A run. `ceiling`: bytes per second, read and written, of a large copy in the same run."""

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
    """Raises ConfigError: not a file of this schema."""
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
