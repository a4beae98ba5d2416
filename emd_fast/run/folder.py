"""The folder of a run: lock, configuration, and whether it holds the same or a finished run.

A run folder has config.toml, teacher/, checkpoints/, log.jsonl, metrics.json, report.md and
samples/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w

from emd_fast import config
from emd_fast.config import EvaluationConfig, RunConfig, to_dict
from emd_fast.io.files import write_text
from emd_fast.reporting.progress import say
from emd_fast.train.state import RESUMABLE

_RESUMABLE = {
    *(f"emd.{name}" for name in RESUMABLE),
    "log_every",
    "save_every",
    "keep_checkpoints",
    "background_checkpoints",
    "peak_tflops",
    "gradient_variance",
    "samples",
    *(f"evaluation.{item.name}" for item in dataclasses.fields(EvaluationConfig)),
}


class RunError(RuntimeError):
    """A run folder cannot be used. The message is one line with the folder and the remedy."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager: keeps other runs out of a folder.

    The lock ends with the block or with this process, however the process ends.

    Raises:
        RunError: another run holds the lock.
        OSError: the folder cannot be written.
    """
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"another run is under way in {folder} ({file.read().strip()}): let it end, or choose another --out"
            ) from None
        except OSError as error:
            say(f"warning: {folder} cannot be locked ({error.strerror}); a second run in it would not be noticed")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def open_folder(folder: Path, settings: RunConfig, held: contextlib.ExitStack) -> None:
    """Creates or reopens a run folder, locks it until `held` closes, and writes config.toml.

    Raises:
        RunError: the folder cannot be written, holds another run or is in use.
    """
    path = folder / "config.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(folder))
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "samples").mkdir(exist_ok=True)
        if path.exists() and _begun(folder):
            _check_same_run(folder, config.load(str(path)), settings)
        write_config(folder, settings)
    except OSError as error:
        raise RunError(
            f"cannot write the run folder {folder}: {error.strerror}: {error.filename}; choose another with --out"
        ) from None


def write_config(folder: Path, settings: RunConfig) -> None:
    write_text(folder / "config.toml", tomli_w.dumps(to_dict(settings)))


def _begun(folder: Path) -> bool:
    """Whether the folder holds results. Until then, its configuration may still be corrected."""
    return any(path.is_file() and path.name not in ("config.toml", ".lock") for path in folder.rglob("*"))


def _check_same_run(folder: Path, was: RunConfig, now: RunConfig) -> None:
    before, after = flat(to_dict(was)), flat(to_dict(now))
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key) and key not in _RESUMABLE:
            raise RunError(
                f"{folder} holds a run with {key} = {before.get(key)!r}, not {after.get(key)!r}: choose another --out"
            )


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested tables to dotted keys."""
    result: dict[str, Any] = {}
    for key, value in table.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def settings_of(folder: Path) -> RunConfig:
    """Reads the configuration of a run.

    Raises:
        RunError: the folder holds no run.
    """
    path = folder / "config.toml"
    if not path.exists():
        raise RunError(f"{folder} is not the folder of a run: it has no config.toml")
    return config.load(str(path))


def finished_metrics(folder: Path, settings: RunConfig) -> dict[str, Any] | None:
    """Returns metrics.json of a run that has made all its steps and has a report, else None."""
    path = folder / "metrics.json"
    if not path.exists() or not (folder / "report.md").exists():
        return None
    try:
        metrics = json.loads(path.read_text())
    except json.JSONDecodeError:
        return None
    return metrics if metrics.get("trained", metrics.get("steps", 0)) >= settings.emd.steps else None
