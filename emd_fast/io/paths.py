"""Names and links in folders of others: single path parts, and no way out of the folder."""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def is_part(name: object) -> bool:
    """Whether a name is one plain part of a path: not empty, no dot in front, no separator, colon or control code."""
    return isinstance(name, str) and _PART.fullmatch(name) is not None


def copy_folder(source: Path, target: Path, roots: tuple[Path, ...]) -> None:
    """Copies regular files and folders. A link is replaced by what it points to.

    Args:
        source: existing folder.
        target: new folder.
        roots: everything that is copied must lie in one of these, links resolved.

    Raises:
        ValueError: a link that leads out of the roots, in a circle or nowhere, or a device, fifo or socket. The
            message names it; what was copied before it stays.
        OSError: a file cannot be read or written.
    """
    _copy_folder(source, target, tuple(root.resolve() for root in roots), ())


def _copy_folder(source: Path, target: Path, roots: tuple[Path, ...], above: tuple[Path, ...]) -> None:
    inside = _resolved(source, roots)
    if inside in above:
        raise ValueError(f"{source} is a link to a folder that it lies in: not copied")
    target.mkdir()
    for name in sorted(os.listdir(inside)):
        path = source / name
        found = _resolved(path, roots)
        mode = found.stat().st_mode
        if stat.S_ISDIR(mode):
            _copy_folder(path, target / name, roots, (*above, inside))
        elif stat.S_ISREG(mode):
            shutil.copyfile(found, target / name)
        else:
            raise ValueError(f"{path} is a device, fifo or socket: not copied")


def _resolved(path: Path, roots: tuple[Path, ...]) -> Path:
    try:
        found = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise ValueError(f"{path} is missing, or a link to nowhere: not copied") from None
    if not any(found.is_relative_to(root) for root in roots):
        raise ValueError(f"{path} is a link out of its folder, to {found}: not followed")
    return found
