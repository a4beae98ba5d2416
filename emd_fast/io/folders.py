"""Replaces and removes folders; a reader finds a whole folder at every moment."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def replace(temporary: Path, path: Path) -> None:
    """Renames a folder that was written under a temporary name to `path`.

    An old folder at `path` is renamed first, and removed at the end. Between the two renames
    `standing` finds the old folder.
    """
    sync(temporary)
    aside = _aside(path)
    if path.exists():
        remove(aside)
        os.rename(path, aside)
    os.rename(temporary, path)
    sync(path.parent)
    remove(aside)


def standing(path: str | Path) -> Path:
    """Returns `path`, or the path of the old folder if a `replace` was killed in between."""
    path = Path(path)
    return _aside(path) if not path.exists() and _aside(path).exists() else path


def remove(path: Path) -> None:
    """Removes a folder or a file. What cannot be removed from a folder stays, without an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Writes the entries of a folder to the disk (fsync)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
