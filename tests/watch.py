"""Watches what happens while a file is read: nothing is run, and memory and time are bounded."""

from __future__ import annotations

import contextlib
import encodings.cp437  # noqa: F401  (zipfile imports it at the first archive)
import sys
import time
import tracemalloc

_FORBIDDEN = ("exec", "compile", "import", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.", "code.")
PROCESSES = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.", "socket.connect")
_seen: list[str] | None = None
_now = _FORBIDDEN


def _hook(event, arguments):
    if _seen is None:
        return
    writes = event == "open" and (
        arguments[1] not in ("r", "rb") if isinstance(arguments[1], str) else arguments[2] & 3
    )
    if event.startswith(_now) or writes:
        _seen.append(f"{event} {arguments[:2]}")


sys.addaudithook(_hook)  # stays until the process ends, and does nothing outside of `watched`


@contextlib.contextmanager
def watched(forbidden=_FORBIDDEN):
    """What is inside runs no source, imports nothing, starts nothing and writes nothing.

    With PROCESSES, it starts nothing and writes nothing, but may import what is installed.
    """
    global _seen, _now
    found: list[str] = []
    _seen, _now = found, forbidden
    try:
        yield
    finally:
        _seen = None
    assert not found, found


@contextlib.contextmanager
def bounded(mib, seconds=20):
    """What is inside takes at most that much memory of Python and numpy, and that much time."""
    began = time.monotonic()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak < mib, f"{peak:.0f} MiB"
    assert time.monotonic() - began < seconds
