"""Architectures of diffusers: one file for each class, found by the name of the class.

docs/teachers.md says how a file is written.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from typing import Any

from torch import nn

from emd_fast.config import ConfigError
from emd_fast.teachers.diffusers.architectures.conditions import ConditionSpec
from emd_fast.teachers.diffusers.architectures.experts import Experts
from emd_fast.teachers.diffusers.architectures.form import Architecture
from emd_fast.teachers.diffusers.architectures.network import Network

__all__ = ["ARCHITECTURES", "Architecture", "ConditionSpec", "Experts", "Network", "file_of", "known", "network"]


def file_of(name: str) -> str:
    """Name of the file of a class of diffusers."""
    return re.sub(r"(Transformer[23]D)?Model$", "", name).lower() + ".py"


def _found() -> dict[str, type[Architecture]]:
    """The classes of this folder by name, each in the file of its name."""
    found = {}
    for info in pkgutil.iter_modules(__path__):
        for name, kind in vars(importlib.import_module(f"{__name__}.{info.name}")).items():
            if isinstance(kind, type) and issubclass(kind, Architecture) and file_of(name) == f"{info.name}.py":
                found[name] = kind
    return found


ARCHITECTURES = _found()


def known(name: str) -> type[Architecture]:
    """The architecture of a class of diffusers.

    Raises:
        ConfigError: an unknown class. The message has the nearest known ones and the file to write.
    """
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=3, cutoff=0.0)
        raise ConfigError(
            f"a {name}, which is not supported: {', '.join(near)} and {len(ARCHITECTURES) - len(near)} others are; "
            f"{__name__.replace('.', '/')}/{file_of(name)} would add it (docs/teachers.md)"
        )
    return ARCHITECTURES[name]


def network(model: nn.Module) -> Network:
    """The network of a model of diffusers.

    Raises:
        ConfigError: its class or its configuration is not supported.
    """
    config: Any = model.config
    return Network(model, known(type(model).__name__)(config))
