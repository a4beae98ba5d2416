"""SIGINT, SIGTERM and SIGHUP in a run: training records them and saves; elsewhere they end the run."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from emd_fast.reporting.progress import say


class Interrupted(BaseException):
    """A signal ended the run, after everything worth keeping was saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Callable[[], int]]:
    """Context manager: the signals are only recorded inside the block.

    Yields a function that returns the number of the first signal, or 0. Leaving the block raises
    Interrupted if there was a signal.
    """
    caught: list[int] = []
    with _handled_by(lambda number, _: caught.append(number)):
        yield lambda: caught[0] if caught else 0
    if caught:
        raise Interrupted(caught[0])


@contextlib.contextmanager
def end_on_signals() -> Iterator[None]:
    """Context manager: the first signal prints a message and raises Interrupted.

    Further signals are ignored, since the run is already ending. A `stop_on_signals` inside the
    block takes precedence.
    """
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
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    # nohup ignores SIGHUP, so that a closed terminal does not end the run. Windows has no SIGHUP.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
