"""Settings with their metadata: default, help, unit, range and resume rule, each written once.

A configuration is a frozen dataclass. `setting` declares a key, `section` a table of keys.
Validation, the help of the command line, the resume rule and docs/configuration.md all read this
metadata.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from emd_fast.io.reading import shown


class ConfigError(ValueError):
    """A configuration that cannot be used.

    The message is one line that names the key, the value and what was expected.
    """


@dataclass(frozen=True)
class While:
    """Resume rule of a key that may change only while another key has a value."""

    key: str
    value: str

    def __str__(self) -> str:
        return f"while {self.key} is {self.value}"

    def holds(self, config: Any) -> bool:
        return bool(operator.attrgetter(self.key)(config) == self.value)


@dataclass(frozen=True)
class Setting:
    """Metadata of a key, as `setting` takes it."""

    help: str
    unit: str = ""
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    resumable: bool | While = False
    flat: str | None = None
    why: str = ""

    @property
    def range(self) -> str:
        """The allowed values in words, "" if every value is allowed."""
        low = self.gt if self.ge is None else self.ge
        high = self.lt if self.le is None else self.le
        if low is not None and high is not None:
            brackets = "(["[self.ge is not None], ")]"[self.le is not None]
            return f"in {brackets[0]}{_number(low)}, {_number(high)}{brackets[1]}"
        if low is not None:
            return f"{'above' if self.ge is None else 'at least'} {_number(low)}"
        return "" if high is None else f"{'below' if self.le is None else 'at most'} {_number(high)}"

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the range: each number of a tuple, each step size of a table."""
        return all(
            (self.gt is None or number > self.gt)
            and (self.ge is None or number >= self.ge)
            and (self.lt is None or number < self.lt)
            and (self.le is None or number <= self.le)
            for number in _numbers(value)
        )

    def check(self, name: str, value: Any) -> None:
        if not self.holds(value):
            each = "each " if isinstance(value, tuple) else ""
            why = f": {self.why}" if self.why else ""
            raise ConfigError(f"{name} must {each}be {self.range}{why}, got {shown(value)}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:  # tensors hold no other
            raise ConfigError(f"{name} must be an integer of 64 bits, got {shown(value)}")


def setting(default: Any, help: str, **facts: Any) -> Any:
    """A field of a configuration.

    Args:
        default: value if none is given.
        help: one line without a full stop, for the command line and the docs.
        unit: unit of the value, for the same places.
        gt, ge, lt, le: range of the number, or of each number of a tuple or a table.
        resumable: whether a run may go on with another value: a bool or a `While`.
        flat: flat name of the key, where it differs from the field's.
        why: reason for the range, for the error.
    """
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **facts)})


@dataclass(frozen=True)
class Section:
    """Metadata of a table, as `section` takes it."""

    help: str
    flat: bool = False


def section(cls: type, help: str, *, flat: bool = False) -> Any:
    """A field that is itself a configuration: a table of the TOML file.

    Args:
        cls: its dataclass; the default is `cls()`.
        help: what the table configures, for the command line and the docs.
        flat: whether the owner's constructor accepts the keys of the table as its own.
    """
    return dataclasses.field(default_factory=cls, metadata={"section": Section(help, flat)})


class FlatKey(NamedTuple):
    """Where a key that a constructor accepts flat belongs."""

    section: str
    key: str


def flat_keys(cls: type) -> dict[str, FlatKey]:
    """The keys of sections that the constructor of `cls` accepts flat, by their flat name."""
    return {
        inner.metadata["setting"].flat or inner.name: FlatKey(item.name, inner.name)
        for item in sections(cls)
        if item.metadata["section"].flat
        for inner in settings(item.default_factory)  # type: ignore[arg-type]
    }


def settings(cls: type) -> Iterator[dataclasses.Field[Any]]:
    """The fields of a configuration that `setting` declared."""
    return (item for item in dataclasses.fields(cls) if "setting" in item.metadata)


def sections(cls: type) -> Iterator[dataclasses.Field[Any]]:
    """The fields of a configuration that `section` declared."""
    return (item for item in dataclasses.fields(cls) if "section" in item.metadata)


def documented(cls: type) -> type:
    """Class decorator: appends the help of every key to the docstring."""
    lines = [f"    {item.name}: {item.metadata['setting'].help}." for item in settings(cls)]
    for item in sections(cls):
        names = [name for name, key in flat_keys(cls).items() if key.section == item.name]
        also = f"; its keys are accepted flat: {', '.join(names)}" if names else ""
        lines.append(f"    {item.name}: {item.metadata['section'].help}{also}.")
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *lines, ""])
    return cls


class Change(NamedTuple):
    """A key that differs between two legs of one run, with both values."""

    key: str
    was: Any
    now: Any


def forbidden_change(was: Any, now: Any) -> Change | None:
    """The first change between two configurations of one class that needs another run, or None.

    A run may go on with other values of the keys that are declared resumable. They change time,
    memory, limits, what is written, and the order in which numbers are summed.
    """
    for item in settings(type(was)):
        rule = item.metadata["setting"].resumable
        may_change = rule.holds(was) if isinstance(rule, While) else rule
        change = Change(item.name, getattr(was, item.name), getattr(now, item.name))
        if change.was != change.now and not may_change:
            return change
    for item in sections(type(was)):
        inner = forbidden_change(getattr(was, item.name), getattr(now, item.name))
        if inner is not None:
            return inner._replace(key=f"{item.name}.{inner.key}")
    return None


def _numbers(value: Any) -> list[float]:
    if isinstance(value, tuple):
        return [item for item in value if not isinstance(item, str)]
    if isinstance(value, list):  # numbers, or pairs [sigma / alpha, step size]
        return [item[1] if isinstance(item, tuple) else item for item in value]
    return [value] if isinstance(value, (int, float)) else []


def _number(value: float) -> str:
    exponent = math.frexp(value)[1] - 1 if value else 0
    return f"2^{exponent}" if exponent > 20 and value == 2**exponent else f"{value:g}"
