"""Reads whole files of others: regular, of a bounded size; text, JSON and TOML that cannot exhaust the reader."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Any

LARGEST = 2**26  # bytes of a file of settings or metrics
_MOST_DOTS = 256


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """The contents of a regular file. A fifo or a device is not opened for reading.

    Raises:
        OSError: it cannot be read. ValueError: no regular file, or a larger one; without the path.
    """
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a fifo would block
    with open(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a regular file")
        if found.st_size > largest:
            raise ValueError(f"it has {found.st_size:,} bytes, at most {largest:,} are read")
        return file.read(largest + 1)


def read_text(path: Path, largest: int = LARGEST) -> str:
    """The text in a file, as `parse_text` has it. Raises as `read_bytes` and `parse_text` do."""
    return parse_text(read_bytes(path, largest))


def parse_text(content: bytes) -> str:
    """Text in UTF-8, without the byte order mark at its start.

    Raises:
        ValueError: another encoding, or a NUL, which UTF-16 has in every Latin letter; with the line and the remedy.
    """
    try:
        text = content.decode("utf-8-sig")
        wrong = content.find(0)
    except UnicodeDecodeError as error:  # with the mark, its start counts from behind it
        text, wrong = "", len(content) - len(error.object) + error.start
    if wrong >= 0:
        what = "has a NUL" if content[wrong] == 0 else "is not UTF-8"
        raise ValueError(f"line {content.count(10, 0, wrong) + 1} {what}: save it as UTF-8")
    return text


def parse_json(content: str | bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: not JSON, or nested without end.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested without end") from None


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML table.

    Raises:
        ValueError: not TOML, nested without end, a number of too many digits, or a line of too many dots.
    """
    for number, line in enumerate(text.split("\n"), 1):
        # tomllib takes the square of the parts of a dotted key in time.
        if line.count(".") > _MOST_DOTS:
            raise ValueError(f"line {number} has more than {_MOST_DOTS} dots: write it as several lines")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested without end") from None


def read_json(path: Path, largest: int = LARGEST) -> Any:
    """The JSON value in a file. Raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, largest))


def reason(error: BaseException) -> str:
    """What an error says, as one short line without a path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def shown(value: Any) -> str:
    """A value or a key as errors show it: one line of bounded length."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested without end; an integer of more digits than Python prints
        text = f"{type(value).__name__} that cannot be printed"
    return text if len(text) <= 200 else f"{text[:200]}..."


def check_regular(folder: Path) -> None:
    """Whether all that lies in a folder is regular files and folders, links followed.

    Raises:
        ValueError: a device, a fifo, a socket or a link to nowhere; with the path.
    """
    for path in sorted(folder.iterdir()):
        if not path.is_dir() and not path.is_file():
            raise ValueError(f"{path} is no regular file")
