"""Errors as the command line reports them: one line and an exit code each."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

REPORTED = (OSError, RuntimeError, ValueError, ModuleNotFoundError, FloatingPointError)
"""Errors of the input or the machine. The message says enough."""
_INPUT = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
_NAMES = {errno.ELOOP, errno.ENAMETOOLONG}  # names that lead to no file; Python has no classes for them
_MACHINE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MACHINE |= {errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EBUSY}

_PACKAGE = Path(__file__).parents[1]


def report(error: Exception) -> None:
    """Prints an error in one line, once: on one rank if all ranks raise it.

    An error of another class is a bug, or a file that no reader expects. Its line has the class,
    the place, and a file with the traceback.
    """
    if getattr(error, "main", True):
        # No code of ours raises a RecursionError: its message does not say which file is nested too deeply.
        is_known = isinstance(error, REPORTED) and not isinstance(error, RecursionError)
        print(f"emd-fast: {error if is_known else _unexpected(error)}", file=sys.stderr, flush=True)
        vars(error)["main"] = False


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with this error (docs/getting_started.md).

    It is 2 if the input is wrong: a ValueError, or a name that leads to no file. It is 1 if the run
    failed or the machine is at fault, also if the input could not be read for that reason. An error
    with an attribute `exit_code` has that one.
    """
    own: int | None = getattr(error, "exit_code", None)
    if own is not None:
        return own
    if any(isinstance(cause, OSError) and cause.errno in _MACHINE for cause in _causes(error)):
        return 1
    return 2 if isinstance(error, _INPUT) or getattr(error, "errno", None) in _NAMES else 1


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that were handled when it was raised."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _unexpected(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)] or frames
    place = f" at {os.path.relpath(own[-1].filename, _PACKAGE.parent)}:{own[-1].lineno}" if own else ""
    what = " ".join([f"{type(error).__name__}{place}:", *str(error).splitlines()[:1]])
    lines = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix="emd-fast-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
    except OSError:  # the traceback must not be lost
        return f"unexpected {what}\n{lines}"
    return f"unexpected {what}; the traceback is in {path}"
