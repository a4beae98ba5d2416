"""SIGINT and SIGTERM in a run: noted while it trains, its end elsewhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from emd_fast.reporting.progress import say


class Interrupted(BaseException):
    """SIGINT or SIGTERM, at a moment where everything worth keeping is kept."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], int]]:
    """Inside, SIGINT and SIGTERM are only noted: what is handed out gives the number of the first, or 0. Leaving raises
    Interrupted if there was one."""
    caught: list[int] = []
    with _handled_by(lambda number, _: caught.append(number)):
        yield lambda: caught[0] if caught else 0
    if caught:
        raise Interrupted(caught[0])


@contextlib.contextmanager
def end_on_signals() -> Iterator[None]:
    """Inside, but where `stop_on_signals` is, the first SIGINT or SIGTERM raises Interrupted where it arrives, and is
    spoken of; others are ignored, since that one is on its way out."""
    caught: list[int] = []

    def end(number: int, _: Any) -> None:
        if not caught:
            caught.append(number)
            raise Interrupted(number)

    with _handled_by(end):
        try:
            yield
        except Interrupted:
            if caught:
                say("stopped; the same command goes on from what is saved")
            raise


@contextlib.contextmanager
def _handled_by(handler: Callable[[int, Any], object]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
