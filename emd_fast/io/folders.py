"""Folders that appear, and are replaced, whole or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def replace(temporary: Path, path: Path) -> None:
    """Renames a folder that was written under a temporary name.

    Where something is at `path`, it is moved aside first: two renames, between which `standing` still finds it.
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
    """Where the folder is: at `path`, or aside if the process died while it was replaced."""
    path = Path(path)
    return _aside(path) if not path.exists() and _aside(path).exists() else path


def remove(path: Path) -> None:
    """Removes a folder or a file, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")
