"""Errors as the command line prints them: one line each."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path

REPORTED = (OSError, RuntimeError, ValueError, ModuleNotFoundError)
"""Errors of the input or the machine. The message says enough."""

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
