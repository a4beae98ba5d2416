"""The folder of a run: lock, configuration, and whether it holds the same or a finished run.

A run folder has config.toml, teacher/, checkpoints/, log.jsonl, metrics.json, report.md and
samples/.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emd_fast import config
from emd_fast.config import RunConfig, forbidden_change, to_dict
from emd_fast.io import folders
from emd_fast.io.files import write_text
from emd_fast.io.reading import read_bytes, reason
from emd_fast.io.signed import check_text, json_of, table_of, text_of
from emd_fast.reporting.progress import say
from emd_fast.tasks import encoded

# Folders that a run writes into.
_FOLDERS = ("checkpoints", "samples", "samples/networks", "teacher", "replay", "tensorboard", "wandb")
# Files of a pipeline and of a model, which a run does not write.
_MODELS = ("model_index.json", "config.json", "emd_fast.json")
_TEMPORARY = re.compile(r"\..+\.tmp")


class RunError(ValueError):
    """A run folder cannot be used. The message is one line with the folder and the remedy."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Context manager: keeps other runs out of a folder.

    The lock ends with the block or with this process, however the process ends.

    Raises:
        RunError: another run holds the lock.
        OSError: the folder cannot be written.
    """
    # A link in the place of the lock would lead to a file of somebody else, and so may a second name of it.
    path = folder / ".lock"
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise RunError(f"{path} is no regular file of its own: remove it")
    with open(handle, "a+") as file:
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
        check_links(folder)
        if any((folder / name).exists() for name in _MODELS):
            raise RunError(f"{folder} is the folder of a model: choose another --out")
        held.enter_context(locked(folder))
        clear_temporaries(folder)
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "samples").mkdir(exist_ok=True)
        if path.exists() and _begun(folder):
            _check_same_run(folder, settings_of(folder), settings)
        write_config(folder, settings)
    except OSError as error:
        raise RunError(
            f"cannot write the run folder {folder}: {error.strerror}: {error.filename}; choose another with --out"
        ) from None


def write_config(folder: Path, settings: RunConfig) -> None:
    """Writes config.toml, with the SHA-256 of its lines in the last one."""
    import tomli_w  # here, since the benchmarks also run where only PyTorch is installed

    write_text(folder / "config.toml", text_of(tomli_w.dumps(to_dict(settings))))


def check_links(folder: Path) -> None:
    """Whether all that is written into a run folder stays there.

    Raises:
        RunError: a folder in it is a link.
    """
    for name in _FOLDERS:
        if (folder / name).is_symlink():
            raise RunError(f"{folder / name} is a link: a run writes nothing through it; make it a folder")


def clear_temporaries(folder: Path) -> None:
    """Removes what killed processes left half-written, in the places that a run writes. The caller holds the lock.

    Other folders may lie in it, with hidden files of others.
    """
    if not (folder / "config.toml").exists():
        return
    for parent in (folder, *(folder / name for name in _FOLDERS)):
        for path in parent.iterdir() if parent.is_dir() else ():
            if _TEMPORARY.fullmatch(path.name):
                folders.remove(path)


def _begun(folder: Path) -> bool:
    """Whether the folder holds results. Until then, its configuration may still be corrected."""
    no_results = {folder / name for name in ("config.toml", ".lock", *encoded.FILES)}
    return any(path.is_file() and path not in no_results for path in folder.rglob("*"))


def _check_same_run(folder: Path, was: RunConfig, now: RunConfig) -> None:
    change = forbidden_change(was, now)
    if change is not None:
        raise RunError(
            f"{folder} holds a run with {change.key} = {change.was!r}, not {change.now!r}: choose another --out"
        )


def settings_of(folder: Path) -> RunConfig:
    """Reads the configuration of a run.

    Raises:
        RunError: the folder holds no run.
    """
    path = folder / "config.toml"
    if not path.exists():
        raise RunError(f"{folder} is not the folder of a run: it has no config.toml")
    check_links(folder)
    try:
        check_text(read_bytes(path))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged, or was changed after the run wrote it ({reason(error)}): restore it, or remove it and "
            "give `emd-fast distill` the recipe and the options of the run again"
        ) from None
    return config.load(str(path))


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Writes metrics.json, with the SHA-256 of its contents in the last field."""
    write_text(folder / "metrics.json", json_of(metrics, indent=1))


def metrics_of(folder: Path) -> dict[str, Any] | None:
    """Returns metrics.json; None if there is none, or with a warning if it is damaged."""
    path = folder / "metrics.json"
    if not path.exists():
        return None
    try:
        return table_of(read_bytes(path), indent=1)
    except (OSError, ValueError) as error:
        say(f"{path} is damaged and not used: {reason(error)}")
        return None


def seconds_of(folder: Path) -> dict[str, float]:
    """Returns the seconds by phase in metrics.json."""
    seconds = (metrics_of(folder) or {}).get("seconds")
    if not isinstance(seconds, dict):
        return {}
    return {name: value for name, value in seconds.items() if type(value) in (int, float)}


def finished_metrics(folder: Path, settings: RunConfig) -> dict[str, Any] | None:
    """Returns metrics.json of a run that has made all its steps and has a report, else None."""
    if not (folder / "report.md").exists() or (metrics := metrics_of(folder)) is None:
        return None
    steps = metrics.get("trained", metrics.get("steps", 0))
    return metrics if type(steps) is int and steps >= settings.emd.steps else None
