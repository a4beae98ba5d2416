"""Prompts of a run, encoded once: prompts.safetensors, and prompts.json, which says what it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from emd_fast.config import ConfigError
from emd_fast.io.files import write_text
from emd_fast.io.reading import read_bytes, read_text, reason
from emd_fast.io.signed import json_of, table_of
from emd_fast.reporting.progress import say
from emd_fast.tasks import OnStep, encoding
from emd_fast.train import run_checkpoints

TABLE, RECORD = "prompts.safetensors", "prompts.json"
_NULL = "null"  # in the record: hash of the negative prompt, where there is one
CONDITIONS = "conditions.json"  # hash of a table that the user gave
FILES = (TABLE, RECORD, CONDITIONS, encoding.PART, encoding.ROWS)
"""What a run writes about its prompts. Until it has a checkpoint, all of it is made again for other prompts."""
_LARGEST, _LONGEST = 2**28, 2**16  # bytes of a file of prompts; characters of a line: text encoders take some hundred
_SMALL = 2**20  # bytes: the contents of such files of an encoder count, of larger ones the size


def lines_of(prompts: Path) -> list[str]:
    """Reads the prompts of a text file in UTF-8, one per line.

    A line ends with LF or CRLF and nowhere else. White space at both ends of a line is removed, and
    so is a byte order mark at its start, which joined files have in the middle. Empty lines are left
    out.

    Raises:
        ConfigError: the file cannot be read, a line cannot be a prompt, or there is no prompt.
    """
    try:
        lines = [_prompt(line, i) for i, line in enumerate(read_text(prompts, _LARGEST).split("\n"), 1)]
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the prompts in {prompts}: {reason(error)}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise ConfigError(f"there is no prompt in {prompts}")
    return lines


def _prompt(line: str, number: int) -> str:
    line = line.removesuffix("\r")
    if "\r" in line:
        raise ValueError(f"line {number} has a carriage return inside: end each line with LF or CRLF")
    if len(line) > _LONGEST:
        raise ValueError(f"line {number} has {len(line):,} characters, at most {_LONGEST:,} are read: shorten it")
    return line.removeprefix("\ufeff").strip()


def encoded(
    teacher: Any, prompts: Path, folder: Path, on_step: OnStep | None = None, negative_prompt: str = ""
) -> Path:
    """The table of the prompts in a run folder, encoded now if it is not there.

    A run that has a checkpoint keeps its table: a changed text or encoder is refused. A run that has
    none encodes the prompts again, and keeps what a killed one encoded of the same text.

    Args:
        teacher: has `text_encoder`, `prompt_dtype`, and `folder` with the text encoders.
        prompts: text file. A table that stands is used without it.
        folder: run folder.
        on_step: is called after each batch.
        negative_prompt: its embedding is the null condition.

    Raises:
        ConfigError: the text or the encoders are not those of the table, the table is damaged, or there is no prompt.
    """
    table, begun = folder / TABLE, bool(run_checkpoints.found(folder / "checkpoints"))
    made_of: dict[str, Any] | None = None
    try:
        made_of = _record(folder)
    except ValueError as error:
        if begun:
            raise ConfigError(
                f"{table} is damaged or not the one that this run made ({reason(error)}): remove it and {RECORD} to "
                f"encode {prompts} again"
            ) from None
    if made_of is not None and not prompts.exists() and table.exists():
        return table
    lines = lines_of(prompts)
    now = {"text": hash_of(lines), "encoder": _encoder(teacher)}
    if negative_prompt:
        now[_NULL] = hash_of([negative_prompt])
    if made_of is not None:
        told = {
            "text": f"{prompts} is not the text",
            "encoder": "the text encoders are not those",
            _NULL: "the negative prompt is not that",
        }
        changed = [name for name in told if made_of.get(name) != now.get(name)]
        if changed and begun:
            what = told[changed[0]]
            raise ConfigError(f"{what} that {table} was made with: restore it, or choose another --out")
        if not changed and table.exists():
            return table
    say(f"encoding {len(lines)} prompts")
    part = encoding.encode(teacher.text_encoder(), lines, folder, now, on_step, negative_prompt)
    # In this order: a run that is killed in between finds the whole table under its first name.
    write_text(folder / RECORD, json_of({"format": 1, **now, **_file(part)}))
    part.replace(table)
    (folder / encoding.ROWS).unlink(missing_ok=True)
    return table


def check_texts(folder: Path, lines: Sequence[str], prompts: Path) -> None:
    """Whether these are the prompts that a run's table was made of.

    Raises:
        ConfigError: they are not.
    """
    if (made_of := _record(folder)) is not None and made_of["text"] != hash_of(lines):
        raise ConfigError(f"{prompts} is not the text that {folder / TABLE} was made with: restore it")


def check_table(path: Path, folder: Path) -> None:
    """Whether a user's table of conditions is the one that the run in a folder began with.

    A run that has no checkpoint notes the hash of its table.

    Raises:
        ConfigError: it is another one, or the note is damaged.
    """
    record, now = folder / CONDITIONS, _file(path)
    if not run_checkpoints.found(folder / "checkpoints"):
        write_text(record, json_of(now))
    elif record.exists():
        try:
            same = table_of(read_bytes(record)) == now
        except (OSError, ValueError) as error:
            raise ConfigError(f"{record} is damaged ({reason(error)}): restore it, or choose another --out") from None
        if not same:
            raise ConfigError(
                f"{path} is not the table of conditions that {folder} began with: restore it, or choose another --out"
            )


def hash_of(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _record(folder: Path) -> dict[str, Any] | None:
    """What the table was made of; None if nothing says so and there is no table.

    Raises:
        ValueError: a damaged record, or a table that is not the recorded one.
    """
    table, path = folder / TABLE, folder / RECORD
    if not path.exists():
        if table.exists():
            raise ValueError(f"there is no {RECORD}")
        return None
    try:
        made_of = table_of(read_bytes(path))
    except OSError as error:
        raise ValueError(reason(error)) from None
    names = {"format", "text", "encoder", "size", "sha256_of_table"}
    if made_of.keys() - {_NULL} != names or made_of["format"] != 1:
        raise ValueError(f"{RECORD} has other fields")
    if table.exists() and any(made_of[name] != value for name, value in _file(table).items()):
        raise ValueError("it does not have the SHA-256 that was recorded")
    return made_of


def _file(table: Path) -> dict[str, Any]:
    if not table.is_file():
        raise ValueError("it is not a regular file")
    with open(table, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": table.stat().st_size, "sha256_of_table": digest}


def _encoder(teacher: Any) -> str:
    """Identity of the text encoders and tokenizers in a teacher's folder: names and sizes, contents of small files.

    It depends on the dtype of the embeddings too, where that is not float32.
    """
    digest, root = hashlib.sha256(), teacher.folder.root
    if teacher.prompt_dtype != torch.float32:
        digest.update(f"{teacher.prompt_dtype}\n".encode())
    if teacher.folder.file is not None:
        digest.update(f"{teacher.folder.file.sha256}\n".encode())
    for path in sorted(path for kind in ("text_encoder*", "tokenizer*") for path in root.glob(f"{kind}/*")):
        if path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.relative_to(root)} {size}\n".encode())
            digest.update(read_bytes(path, _SMALL) if size <= _SMALL else b"")
    return digest.hexdigest()
