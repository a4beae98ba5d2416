"""Errors as the command line prints them: one line each."""

from __future__ import annotations

import sys

REPORTED = (OSError, RuntimeError, ValueError, ModuleNotFoundError)
"""Errors of the input or the machine, printed without a traceback."""


def report(error: Exception) -> None:
    """Prints an error once: on one rank if all ranks raise it."""
    if isinstance(error, REPORTED) and getattr(error, "main", True):
        print(f"emd-fast: {error}", file=sys.stderr, flush=True)
        vars(error)["main"] = False
