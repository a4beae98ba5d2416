"""Code that a file names: it is run only where the user names the same code.

A run folder, a recipe and an exported generator are data. They may come from anybody, and they may
name code: a function that makes the teacher, a file with a TorchScript program. The command line
calls `allow` with what stands in its options. In Python, `with allow("my_module:teacher"): ...`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_named: ContextVar[frozenset[str]] = ContextVar("code named by the user", default=frozenset())


class CodeRefused(ValueError):
    """A file names code that the user did not name. One line: what it wants, and how to allow it."""


@contextlib.contextmanager
def allow(*names: str | None) -> Iterator[None]:
    """Context manager: what is inside may run the code of these names. None stands for no name."""
    token = _named.set(_named.get() | {name for name in names if name})
    try:
        yield
    finally:
        _named.reset(token)


def is_allowed(name: str) -> bool:
    return name in _named.get()


def require(name: str, what: str, option: str) -> None:
    """Refuses code that the user did not name.

    Args:
        name: the code, as the file names it.
        what: what the file wants to do with it.
        option: option of the command line that names it.

    Raises:
        CodeRefused: `allow` was not called with this name.
    """
    if not is_allowed(name):
        raise CodeRefused(f"this run {what} {name!r}: give {option} {name} to allow it, if you trust that code")
