"""Files that state the SHA-256 of their own contents, so that a bit that turns is seen when they are read."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

from emd_fast.io.reading import parse_json

_COMMENT = "# SHA-256 of the lines above: "
_ROW = ', "crc": "'


def json_of(table: Mapping[str, Any], indent: int | None = None) -> str:
    """The table as JSON, with the SHA-256 of its JSON as the last field."""
    digest = hashlib.sha256(json.dumps(table, indent=indent).encode()).hexdigest()
    return json.dumps({**table, "sha256": digest}, indent=indent)


def table_of(content: bytes, indent: int | None = None) -> dict[str, Any]:
    """The table that `json_of` wrote with this indent, without the digest.

    Raises:
        ValueError: not such a file, or a changed one.
    """
    table = parse_json(content)
    if not isinstance(table, dict) or type(table.pop("sha256", None)) is not str:
        raise ValueError("it is no JSON object with the SHA-256 of its contents")
    # Compared as bytes: a bit that turns is seen even where JSON would give the same values.
    if json_of(table, indent).encode() != content:
        raise ValueError("it does not have the SHA-256 that it states")
    return table


def text_of(text: str) -> str:
    """Lines of text, with their SHA-256 as a comment in the last line (TOML)."""
    return f"{text}{_COMMENT}{hashlib.sha256(text.encode()).hexdigest()}\n"


def check_text(content: bytes) -> None:
    """Whether a text is as `text_of` wrote it.

    Raises:
        ValueError: it is not.
    """
    text, marked, _ = content.rpartition(_COMMENT.encode())
    if not marked or text_of(text.decode(errors="replace")).encode() != content:
        raise ValueError("it does not end with the SHA-256 of its contents")


def row_of(row: Mapping[str, Any]) -> str:
    """One line of JSON, with the CRC-32 of its text as the last field."""
    text = json.dumps(row)[:-1]
    return f'{text}{_ROW}{zlib.crc32(text.encode()):08x}"}}\n'


def checked_row(line: str) -> str:
    """A line of JSON that `row_of` wrote, without the checksum; one that has none as it is.

    Raises:
        ValueError: another checksum than the line states.
    """
    text, marked, _ = line.rpartition(_ROW)
    if not marked:
        return line
    if f'{text}{_ROW}{zlib.crc32(text.encode()):08x}"}}' != line:
        raise ValueError("it does not have the checksum that it states")
    return text + "}"
