"""Recipes: the ones that ship with the library, and TOML files."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from emd_fast.config.run import RunConfig
from emd_fast.config.settings import ConfigError
from emd_fast.config.tables import from_dict, nearest


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
                    raise ConfigError(f"{'.'.join(tables[:depth])} must be a table, got {table!r}")
            table[name] = value
        return from_dict(RunConfig, data)
    except ConfigError as error:
        raise ConfigError(f"{recipe}: {error}") from None


def _read(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix == ".toml":
        try:
            if path.exists() and not path.is_file():  # a fifo would block
                raise ConfigError(f"cannot read the recipe {recipe}: it is not a regular file")
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the recipe {recipe}: {getattr(error, 'strerror', error)}") from None
    elif recipe in recipes():
        text = (resources.files("emd_fast") / "recipes" / f"{recipe}.toml").read_text()
    else:
        known = f"the recipes are {', '.join(recipes())}; a .toml file is given by its path"
        raise ConfigError(f"no recipe {recipe!r}: {known}{nearest(recipe, recipes())}")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(f"{recipe} is not valid TOML: {error}") from None
