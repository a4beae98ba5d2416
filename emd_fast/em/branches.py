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
    on = False


_active = _Active()


@contextlib.contextmanager
def branches(wanted: bool = True) -> Iterator[None]:
    """Inside it, in this thread, `side_by_side` uses a second CUDA stream."""
    outer, _active.on = _active.on, wanted
    try:
        yield
    finally:
        _active.on = outer


def side_by_side(first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
    """Both results. Inside `branches` the second runs on a stream of its own, which starts and ends with this call:
    what it allocates is used again only by a stream that has waited."""
    if torch.compiler.is_compiling() or not _active.on:
        return first(), second()
    current, other = torch.cuda.current_stream(), torch.cuda.Stream()
    other.wait_stream(current)
    with torch.cuda.stream(other):
        b = second()
    a = first()
    current.wait_stream(other)
    return a, b
