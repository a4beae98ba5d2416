"""What tests of hostile and damaged files share: a watch over what is run, wrong fields, bits that turn."""

import contextlib
import encodings.cp437  # noqa: F401  (zipfile imports it at the first archive)
import json
import os
import sys
import time
import tracemalloc

from emd_fast.train import checkpoint_format

_FORBIDDEN = ("exec", "compile", "import", "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pickle.", "code.")
PROCESSES = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "subprocess.", "socket.connect")
_seen: list[str] | None = None
_now = _FORBIDDEN


def _hook(event, arguments):
    if _seen is None:
        return
    way = arguments[1:3]
    writes = event == "open" and (way[0] not in ("r", "rb") if isinstance(way[0], str) else way[1] & 3)
    if event.startswith(_now) or writes:
        _seen.append(f"{event} {arguments[:2]}")


sys.addaudithook(_hook)  # stays until the process ends, and does nothing outside of `watched`


@contextlib.contextmanager
def watched(forbidden=_FORBIDDEN):
    """Inside nothing is run, imported, started or written; with PROCESSES, what is installed may be imported."""
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
    """What is inside takes at most that much memory of Python and numpy, and processor time."""
    began = time.process_time()
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert peak < mib, f"{peak:.0f} MiB"
    assert time.process_time() - began < seconds


class Runs:
    """Pickles as a call of os.system."""

    def __reduce__(self):
        return os.system, ("touch /tmp/emd_fast_ran",)


def one_line(error, path, most=700):
    """What was said of this path, in one line."""
    said = str(error.value)
    assert str(path) in said and "\n" not in said and len(said) < most + 2 * len(str(path)), said
    return said


def resigned(path, change):
    """The manifest of a checkpoint changed by somebody who signs it again."""
    table = json.loads((path / "manifest.json").read_bytes())
    del table["sha256"]
    change(table)
    (path / "manifest.json").write_bytes(checkpoint_format.signed(table))


def turned(content, draw):
    """The content with one bit changed."""
    damaged = bytearray(content)
    damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


_MISSING = object()


def at(*keys, value=_MISSING):
    """change(table): sets this field of it, or removes it where no value is given."""

    def change(table):
        for key in keys[:-1]:
            table = table[key]
        if value is _MISSING:
            del table[keys[-1]]
        else:
            table[keys[-1]] = value

    return change


def fields(wrong, prefix=()):
    """{name: change} of {"key.key": wrong values}."""
    return {
        f"{path}-{i}": at(*prefix, *path.split("."), value=value)
        for path, values in wrong.items()
        for i, value in enumerate(values)
    }
