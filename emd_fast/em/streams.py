"""Runs independent network passes on two CUDA streams, if `branches` is active."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

A = TypeVar("A")
B = TypeVar("B")


class _Active(threading.local):
    other: torch.cuda.Stream | None = None


_active = _Active()


@contextlib.contextmanager
def branches(wanted: bool = True) -> Iterator[None]:
    """Context manager: `side_by_side` uses a second CUDA stream inside, in this thread.

    All calls share this stream. Memory that was freed on a stream is reused only on that stream,
    so a stream per call would take the memory of a pass per call.
    """
    outer, _active.other = _active.other, torch.cuda.Stream() if wanted else None
    try:
        yield
    finally:
        _active.other = outer


def side_by_side(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """Returns the results of both functions. Inside `branches`, `second` runs on the other stream.

    The other stream waits for the current one at the start, and the current one waits for it at
    the end. Memory is therefore reused only by a stream that has waited. Neither function may read
    the results of the other.
    """
    if torch.compiler.is_compiling() or (other := _active.other) is None:
        return first(), second()
    current = torch.cuda.current_stream()
    other.wait_stream(current)
    with torch.cuda.stream(other):
        b = second()
    a = first()
    current.wait_stream(other)
    return a, b
