"""Code that the command line names: what a run folder or a recipe may run besides nothing (docs/files.md)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from emd_fast.cli.keys import overrides
from emd_fast.config import ConfigError


def add_teacher(command: argparse.ArgumentParser) -> None:
    """Adds the option of commands that open a run."""
    command.add_argument(
        "--teacher", metavar="MODULE:FUNCTION", help="Python code of this run's teacher: allow it to be imported"
    )


def named(options: argparse.Namespace, rest: Sequence[str]) -> list[str | None]:
    """Returns the code that a command line names: a teacher's function, a detector's file.

    Raises:
        ConfigError: --teacher of a command that opens a run is not the teacher of that run.
    """
    keys = overrides(rest) if rest else {}
    folder = getattr(options, "source", getattr(options, "run", None))
    if folder is not None and options.teacher is not None:
        from emd_fast.run.folder import settings_of

        has = settings_of(folder).pretrained.teacher
        if options.teacher != has:
            raise ConfigError(f"{folder} has the teacher {has!r}, not {options.teacher!r}")
    names = [getattr(options, "teacher", None), getattr(options, "detector", None)]
    names += [keys.get("pretrained.teacher"), keys.get("evaluation.detector")]
    return [name if name is None else str(name) for name in names]
