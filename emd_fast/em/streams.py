"""Passes that do not depend on each other, side by side where somebody asked for it."""

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
    """Inside it, in this thread, `side_by_side` uses a second CUDA stream.

    One for all calls: what a stream has freed only that stream gets again, so that with a stream for each call each
    would take the memory of a pass.
    """
    outer, _active.other = _active.other, torch.cuda.Stream() if wanted else None
    try:
        yield
    finally:
        _active.other = outer


def side_by_side(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """Both results. Inside `branches` the second runs on the other stream, which starts and ends with this call: what
    it allocates is used again only by a stream that has waited. Neither may read what the other makes meanwhile."""
    if torch.compiler.is_compiling() or (other := _active.other) is None:
        return first(), second()
    current = torch.cuda.current_stream()
    other.wait_stream(current)
    with torch.cuda.stream(other):
        b = second()
    a = first()
    current.wait_stream(other)
    return a, b
