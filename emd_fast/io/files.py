"""Files that are there whole or not at all, and errors that name them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes to a temporary name beside `path`, then renames: a crash or a full disk leaves what was there.

    Raises:
        OSError: what the file system says, with the path; the temporary file is gone then.
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
        with contextlib.suppress(OSError):  # what went wrong before is what to say
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """The same of text, in UTF-8.

    Raises:
        OSError: as for `write_whole`.
    """
    write_whole(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an OSError gets this path: the system names none where it is a write that fails."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
