"""Description of every key, for `--help` and docs/configuration.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from emd_fast.config.emd import EMDConfig
from emd_fast.config.run import RunConfig
from emd_fast.config.settings import Setting, flat_keys, sections, settings


@dataclass(frozen=True)
class Entry:
    """A key of the configuration.

    Args:
        key: dotted name, "emd.optimizer.generator_lr".
        short: name on the command line, "generator_lr".
        default, values: in words.
        facts: its metadata.
    """

    key: str
    short: str
    default: str
    values: str
    facts: Setting


@dataclass(frozen=True)
class Table:
    """A table of the configuration: dotted name ("" at the top), help, keys."""

    name: str
    help: str
    entries: tuple[Entry, ...]


def tables(cls: type = RunConfig, name: str = "", help: str = "the run") -> Iterator[Table]:
    """Every table of a configuration with its keys, in the order of the code."""
    hints, prefix = get_type_hints(cls), f"{name}." if name else ""
    entries = []
    for item in settings(cls):
        facts = item.metadata["setting"]
        values = ", ".join(filter(None, [_values(hints[item.name], facts), facts.unit]))
        entries.append(Entry(prefix + item.name, _short(prefix + item.name), shown(item.default), values, facts))
    yield Table(name, help, tuple(entries))
    for item in sections(cls):
        yield from tables(hints[item.name], prefix + item.name, item.metadata["section"].help)


def _short(key: str) -> str:
    """Keys of [emd] go by their name, keys of its sections by their flat name."""
    names = {f"emd.{place.section}.{place.key}": name for name, place in flat_keys(EMDConfig).items()}
    return names.get(key, key.removeprefix("emd."))


def _values(hint: Any, facts: Setting) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(get_args(hint))
    if get_origin(hint) in (Union, UnionType) and bool in get_args(hint):
        return ", ".join(_values(option, facts) for option in get_args(hint))
    if hint is bool:
        return "true, false"
    if get_origin(hint) is tuple and get_origin(get_args(hint)[0]) is Literal:
        return f"some of {', '.join(get_args(get_args(hint)[0]))}"
    return f"each {facts.range}" if get_origin(hint) is tuple and facts.range else facts.range


def shown(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


_PREFACE = """# Configuration

This file is generated: `python -m emd_fast.config > docs/configuration.md`.

A recipe is a TOML file with the tables below, and so is the `config.toml` of a run folder.
Every key is also an option of `emd-fast distill`, `study` and `plan`: `--teacher.steps 100`. Keys
of `[emd]` and of its sections have a short name as well: `--generator-lr 1e-4` is
`--emd.optimizer.generator-lr 1e-4`.

In Python the constructor accepts the keys of the sections flat, `EMDConfig(generator_lr=1e-4)`.
They are read from their section, `config.optimizer.generator_lr`. The short and flat name of
`emd.optimizer.name` is `optimizer_name`.

*Resume* says whether the value may change when a run goes on from a checkpoint. A change of any
other value needs another run folder.

Every default is the project's own, found on the digits and the mixture; the paper's tables of
hyperparameters were not at hand.
"""


def markdown() -> str:
    """The content of docs/configuration.md."""
    parts = [_PREFACE]
    for table in tables():
        title = f"`[{table.name}]`" if table.name else "At the top"
        rows = ["| key | default | values | resume | |", "| --- | --- | --- | --- | --- |"]
        for entry in table.entries:
            rule = entry.facts.resumable
            resume = ("no", "yes")[rule] if isinstance(rule, bool) else str(rule)
            key = entry.key.rpartition(".")[2]
            rows.append(f"| `{key}` | `{entry.default}` | {entry.values} | {resume} | {entry.facts.help} |")
        parts.append("\n".join([f"## {title}: {table.help}", "", *rows, ""]))
    return "\n".join(parts)
