"""Recipes: the ones that ship with the library, and TOML files."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from emd_fast.config.run import RunConfig
from emd_fast.config.settings import ConfigError
from emd_fast.config.tables import from_dict, nearest
from emd_fast.io.reading import parse_toml, read_text, reason, shown

_LARGEST = 2**16  # bytes of a recipe; the longest that ships has a thirtieth


def recipes() -> list[str]:
    """The names of the recipes that ship with the library."""
    folder = resources.files("emd_fast") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load(recipe: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Loads a recipe.

    Args:
        recipe: name of a recipe, or path of a .toml file.
        overrides: values by dotted key, {"emd.steps": 100}.

    Raises:
        ConfigError: no such recipe (with the nearest right name), or not a valid configuration.
    """
    data = _read(recipe)
    try:
        for key, value in (overrides or {}).items():
            *tables, name = key.split(".")
            table = data
            for depth, part in enumerate(tables, 1):
                table = table.setdefault(part, {})
                if not isinstance(table, dict):
                    raise ConfigError(f"{'.'.join(tables[:depth])} must be a table, got {shown(table)}")
            table[name] = value
        return from_dict(RunConfig, data)
    except ConfigError as error:
        raise ConfigError(f"{recipe}: {error}") from None


def _read(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix == ".toml":
        try:
            text = read_text(path, _LARGEST)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read the recipe {recipe}: {reason(error)}") from None
    elif recipe in recipes():
        text = (resources.files("emd_fast") / "recipes" / f"{recipe}.toml").read_text("utf-8")
    else:
        known = f"the recipes are {', '.join(recipes())}; a .toml file is given by its path"
        raise ConfigError(f"no recipe {recipe!r}: {known}{nearest(recipe, recipes())}")
    try:
        return parse_toml(text)
    except ValueError as error:
        raise ConfigError(f"{recipe} is not valid TOML: {reason(error)}") from None
