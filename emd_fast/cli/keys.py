"""Keys of the configuration as options of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emd_fast import config
from emd_fast.config import ConfigError
from emd_fast.io.reading import parse_toml


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """Reads options as overrides: {"emd.gamma_z": 0.02} from ["--gamma-z", "0.02"].

    Raises:
        ConfigError: an unknown option, with the nearest right one, or one without a value.
    """
    known: dict[str, str] = {}
    for table in config.tables():
        for entry in table.entries:
            known |= {_option(entry.key): entry.key, _option(entry.short): entry.key}
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        option, has_value, value = rest.pop(0).partition("=")
        spelt = option.replace("_", "-")
        if spelt not in known:
            near = config.nearest(spelt.replace("student", "fake-score"), list(known))
            raise ConfigError(f"unknown option {option!r}{near}")
        if not has_value:
            if not rest:
                raise ConfigError(f"{option} needs a value")
            value = rest.pop(0)
        found[known[spelt]] = value_of(value)
    return found


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def value_of(text: str) -> Any:
    """The value that an option's text stands for: TOML, or a bare word."""
    if text.lower() == "none":
        return None
    try:
        return text if "\n" in text else parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def help_of(key: str) -> str:
    """The help of a key, for an option of its own."""
    (text,) = (entry.facts.help for table in config.tables() for entry in table.entries if entry.key == key)
    return text


def described() -> str:
    """The part of `--help` on keys: the option with the default, what it is, its values."""
    lines = [
        "keys of the configuration, with their defaults (docs/configuration.md has them as a table).",
        "Keys of [emd] have their short names here: --generator-lr is --emd.optimizer.generator-lr.",
        "Values are TOML or a bare word; t is the time of the schedule, for EDM sigma itself.",
    ]
    for table in config.tables():
        lines += ["", f"{table.help} [{table.name}]:" if table.name else f"{table.help}:"]
        for entry in table.entries:
            values = f" ({entry.values})" if entry.values and entry.values != "true, false" else ""
            lines.append(f"  {f'{_option(entry.short)} {entry.default}':40}  {entry.facts.help}{values}")
    return "\n".join([*lines, *_EXAMPLES])


_EXAMPLES = [
    "",
    "examples:",
    "  emd-fast distill digits --langevin-steps 8 --seed 1 --out runs/k8",
    "  emd-fast distill digits --noise-cancellation false --teacher.steps 1000 --out runs/noisy",
    "  emd-fast distill gmm --gamma-z '[[0.05, 1e-4], [0.5, 0.01]]' --out runs/table",
]
