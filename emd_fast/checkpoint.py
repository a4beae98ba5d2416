"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

_FORMAT = "emd_fast checkpoint"
_VERSION = 1
_NAME = re.compile(r"step-(\d{8})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: one line that names the file and the remedy."""


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes to a temporary name beside `path`, then renames: a crash or a full disk leaves what was there.

    Raises:
        OSError: what the file system says; the temporary file is gone then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Writes a state of tensors and plain values.

    Raises:
        CheckpointError: it cannot be written; what stood at `path` before is intact.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: torch.save({"format": _FORMAT, "version": _VERSION, **state}, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise CheckpointError(
            f"cannot write the checkpoint {path}: {reason}; what was there before is intact"
        ) from error


def load(path: str | Path) -> dict[str, Any]:
    """Reads what `save` wrote, to the CPU.

    Raises:
        CheckpointError: a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or no checkpoint of emd_fast ({type(error).__name__}); use an earlier one"
        ) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of emd_fast")
    if state.get("version") != _VERSION:
        raise CheckpointError(f"{path} has format version {state.get('version')}, this release reads {_VERSION}")
    return state


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by rising step."""
    return sorted(entry for entry in folder.glob("step-*.pt") if _NAME.fullmatch(entry.name))


def keep_last(folder: Path, count: int) -> None:
    for old in found(folder)[:-count]:
        old.unlink()
