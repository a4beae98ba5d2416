"""The checkpoints of a run: their names, which of them stay, and what a killed process left."""

from __future__ import annotations

import os
import re
from pathlib import Path

from emd_fast.io import folders

_NAME = re.compile(r"step-(\d{8})")


def path_of(folder: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint that `found` returned."""
    return int(path.name.removeprefix("step-"))


def best_of(folder: Path) -> Path:
    """Path of the best checkpoint. `found` and `keep_last` do not see it."""
    return folder / "best"


def exists(path: str | Path) -> bool:
    """Whether there is a checkpoint, also while its folder is being replaced."""
    return folders.standing(path).exists()


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in order of their steps."""
    return sorted(entry for entry in folder.glob("step-*") if _NAME.fullmatch(entry.name))


def keep_last(folder: Path, count: int, step: int) -> None:
    """Removes all but the last `count` checkpoints of at most `step` steps.

    Later ones could not be read, or the run would have resumed there. They stay until the run
    reaches their steps again.
    """
    for old in [path for path in found(folder) if step_of(path) <= step][:-count]:
        # Out of sight first: half of a folder must not pass for a checkpoint.
        hidden = old.with_name(f".{old.name}.tmp")
        folders.remove(hidden)
        os.rename(old, hidden)
        folders.remove(hidden)


def clear_unfinished(folder: Path) -> None:
    """Removes what a killed process left half-written."""
    for pattern in (".step-*.tmp", ".best.tmp"):
        for entry in folder.glob(pattern):
            folders.remove(entry)
