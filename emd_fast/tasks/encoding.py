"""Encodes prompts into a table in batches, and goes on where a killed run ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from emd_fast.diffusion.denoiser import Condition
from emd_fast.io.files import naming
from emd_fast.io.reading import parse_json, read_text
from emd_fast.io.signed import checked_row, row_of
from emd_fast.reporting.progress import say
from emd_fast.tasks import OnStep
from emd_fast.train import conditions

PART, ROWS = "prompts.part", "prompts.part.jsonl"
"""The unfinished table, and what it is made of, with a checksum for each batch that it holds."""


class Encoder(Protocol):
    """Text encoders that were read once."""

    batch: int  # prompts that it takes at once

    def __call__(self, prompts: Sequence[str]) -> Condition: ...

    def truncated(self, prompts: Sequence[str]) -> int: ...


def encode(
    encoder: Encoder,
    lines: Sequence[str],
    folder: Path,
    made_of: Mapping[str, Any],
    on_step: OnStep | None,
    negative_prompt: str = "",
) -> Path:
    """Writes the table of the prompts and of the negative one to a file of the run folder, and returns its path.

    Batches that an earlier call with the same `made_of` wrote are kept if their checksums hold.
    Memory is that of one batch.

    Args:
        encoder: the text encoders.
        lines: the prompts.
        folder: run folder.
        made_of: identity of all prompts and of the encoders.
        on_step: is called after each batch, and may raise.
        negative_prompt: its embedding is the null condition.

    Raises:
        ValueError: an embedding that is not finite.
        OSError: the file cannot be written.
    """
    head = {**made_of, "prompts": len(lines), "batch": encoder.batch}
    found = _rows(folder / ROWS, head)
    null = encoder([negative_prompt])
    starts = range(0, len(lines), encoder.batch)
    with _opened(folder / PART) as file, _opened(folder / ROWS) as rows:
        with naming(folder / PART):
            table = conditions.Writer(file, len(lines), null, null)
            sizes = {start: min(encoder.batch, len(lines) - start) for start in starts}
            kept = [start for start in starts if start in found and found[start][0] == table.crc(start, sizes[start])]
        truncated = sum(found[start][1] for start in kept)
        rows.truncate()
        for row in (head, *({"first": start, "crc": found[start][0], "truncated": found[start][1]} for start in kept)):
            rows.write(row_of(row).encode())
        if kept:
            say(f"{len(kept) * encoder.batch if len(kept) < len(starts) else len(lines)} prompts are encoded already")
        done = len(kept)
        for start in (start for start in starts if start not in set(kept)):
            batch = list(lines[start : start + encoder.batch])
            cut = encoder.truncated(batch)
            cond = encoder(batch)
            conditions.check_finite(cond, f"the text encoders give NaN or infinite values for prompts from {start} on")
            with naming(folder / PART):
                crc = table.write(start, cond)
            with naming(folder / ROWS):
                rows.write(row_of({"first": start, "crc": crc, "truncated": cut}).encode())
            truncated, done = truncated + cut, done + 1
            if on_step is not None:
                on_step(done, len(starts), 0.0, name="encoding prompts, batch", kept=True)
        with naming(folder / PART):
            os.fsync(file.fileno())
    if truncated:
        say(f"warning: {truncated} of {len(lines)} prompts have more tokens than the text encoders take: truncated")
    return folder / PART


def _rows(path: Path, head: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """The batches that an unfinished table of this head holds: first prompt -> (CRC-32, truncated prompts)."""
    found: dict[int, tuple[int, int]] = {}
    try:
        first, *rows = read_text(path).split("\n")
        if json.dumps(parse_json(checked_row(first))) != json.dumps(head):
            return {}
        for row in rows:
            match parse_json(checked_row(row)):
                case {"first": int(start), "crc": int(crc), "truncated": int(cut)}:
                    found[start] = crc, cut
    except (OSError, ValueError):  # what was read before a torn or damaged row counts
        pass
    return found


def _opened(path: Path) -> BinaryIO:
    """Opens a file to read and write, kept as it is. What is no regular file of its own is replaced."""
    if path.is_symlink() or (path.exists() and (not path.is_file() or path.stat().st_nlink > 1)):
        path.unlink()
    return open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
