"""Atomic writes of files, and OSErrors that name the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name beside `path`, syncs it and renames it to `path`.

    After a crash or on a full disk the old file is unchanged.

    Args:
        path: path of the file.
        write: writes the contents to the open file.

    Raises:
        OSError: the file cannot be written. The message has its path. The temporary file is
            removed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            temporary.unlink(missing_ok=True)  # of a killed process with this number, or a link
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # an earlier error must not be replaced
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8 as `write_atomic` does.

    Raises:
        OSError: as for `write_atomic`.
    """
    write_atomic(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context manager: adds this path to an OSError. The system gives none for a failed write."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
