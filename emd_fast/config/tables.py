"""Conversion between configurations and what TOML holds, with types checked."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import types
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from emd_fast.config.settings import ConfigError, flat_keys
from emd_fast.io.reading import shown

T = TypeVar("T")
_NOT_IN_NAMES = ("Cc", "Cs", "Zl", "Zp")  # controls, lone surrogates, separators of lines and paragraphs


def validate(config: Any) -> None:
    """Converts what is safe to convert, and checks types and ranges of a dataclass in place.

    An int becomes a float, a list a tuple, a table its dataclass.

    Raises:
        ConfigError: a value of another type or outside its range, or a number that is not finite.
    """
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        fact = item.metadata.get("setting")
        name = (fact and fact.flat) or item.name
        value = converted(getattr(config, item.name), hints[item.name], name)
        object.__setattr__(config, item.name, value)
        if fact is not None:
            fact.check(name, value)


def converted(value: Any, wanted: Any, name: str) -> Any:
    """Converts a value to the type of a field.

    Raises:
        ConfigError: the value is of another type.
    """
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return converted(value, option, name)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
        near = nearest(value, [str(argument) for argument in arguments]) if isinstance(value, str) else ""
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {shown(value)}{near}")
    elif origin is tuple and arguments[1:] == (...,) and isinstance(value, (list, tuple)):
        return tuple(converted(v, arguments[0], name) for v in value)
    elif origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(converted(v, a, name) for v, a in zip(value, arguments, strict=True))
    elif origin is list and isinstance(value, (list, tuple)):
        return [converted(v, arguments[0], name) for v in value]
    elif isinstance(wanted, type) and dataclasses.is_dataclass(wanted) and isinstance(value, Mapping):
        return from_dict(wanted, value, name)
    elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # an integer beyond the largest float
            if math.isfinite(number := float(value)):
                return number
    elif wanted is str and isinstance(value, str):
        # Such a name would break the one line of an error, and no file has a NUL in its name.
        if any(unicodedata.category(letter) in _NOT_IN_NAMES for letter in value):
            raise ConfigError(f"{name} must be text without control characters, in UTF-8, got {shown(value)}")
        return value
    elif isinstance(wanted, type) and isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{name} must be {_spell(wanted)}, got {shown(value)}")


def _spell(wanted: Any) -> str:
    if wanted is type(None):
        return "nothing"
    if get_origin(wanted) is Literal:
        return " or ".join(map(repr, get_args(wanted)))
    if get_origin(wanted) is tuple and get_args(wanted)[1:] == (...,):
        return f"a list of {_spell(get_args(wanted)[0])}"
    if any(get_origin(option) is Literal for option in get_args(wanted)):  # of a union
        return " or ".join(map(_spell, get_args(wanted)))
    if dataclasses.is_dataclass(wanted):
        return f"a table with the keys {', '.join(item.name for item in dataclasses.fields(wanted))}"
    return getattr(wanted, "__name__", str(wanted)) if get_origin(wanted) is None else str(wanted)


def nearest(word: str, right: Sequence[str], instead: str = "") -> str:
    """The hint "; did you mean ...?" with the nearest right word, or `instead` if none is near."""
    near = difflib.get_close_matches(word, right, 1)
    return f"; did you mean {near[0]!r}?" if near else instead


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Builds the dataclass `cls` from what a TOML table holds.

    Args:
        path: dotted name of the table, for errors.

    Raises:
        ConfigError: an unknown key (with the nearest right one), a key that belongs to a section,
            a wrong type or a value outside its range.
    """
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    hints, flat = get_type_hints(cls), flat_keys(cls)
    prefix = f"{path}." if path else ""
    read = {}
    for key, value in data.items():
        if key not in names:
            renamed = key.replace("student", "fake_score")
            where = f" of [{prefix}{flat[renamed].section}]" if renamed in flat else ""
            if renamed != key and (renamed in names or where):
                raise ConfigError(f"{shown(key)} is a key of a release before 0.2: it is {shown(renamed)}{where} now")
            if where:
                raise ConfigError(f"{shown(prefix + key)} is a key{where} now")
            near = nearest(key, [*names, *flat], f"; the keys are {', '.join(names)}")
            raise ConfigError(f"unknown key {shown(prefix + key)}{near}")
        is_table = dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping)
        read[key] = from_dict(hints[key], value, prefix + key) if is_table else value
    return cls(**read)


def to_dict(config: Any) -> dict[str, Any]:
    """Converts a configuration to what TOML can hold. None is left out, since TOML has none."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    found: dict[str, Any] = plain(dataclasses.asdict(config))
    return found


def flatten(config: Any) -> dict[str, Any]:
    """The values of a configuration by dotted key: {"emd.optimizer.generator_lr": 0.001, ...}."""

    def flat(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in table.items():
            result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return result

    return flat(to_dict(config), "")
