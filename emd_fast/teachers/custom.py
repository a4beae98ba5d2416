"""Teachers from a user's function, named as "package.module:function"."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from emd_fast.config import ConfigError
from emd_fast.diffusion.denoiser import Denoiser


def load(name: str) -> Denoiser:
    """Imports the module and calls the function without arguments.

    The working directory is searched too.

    Returns:
        The Denoiser that the function returned.

    Raises:
        ConfigError: there is no such module or function, or it does not return a Denoiser.
    """
    module_name, _, function_name = name.rpartition(":")
    _check_words(name, module_name, function_name)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"cannot import the teacher's module {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"the module {module_name!r} has no function {function_name!r} for a teacher")
    teacher = function()
    if not isinstance(teacher, Denoiser):
        raise ConfigError(f"{name} must return an emd_fast.Denoiser, got {type(teacher).__name__}")
    teacher.source = teacher.source or name
    return teacher


def _check_words(name: str, module: str, function: str) -> None:
    if module.endswith(".py") or "/" in module or "\\" in module:
        path = Path(module)
        word = path.stem if path.suffix == ".py" else path.name
        words = f"{word}:{function or 'FUNCTION'}"
        where = "" if path.parent == Path() else f", and run in {path.parent} or add it to PYTHONPATH"
        raise ConfigError(f"--teacher {name} has a path where a module is expected: give --teacher {words}{where}")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ConfigError(f"--teacher {name} is not package.module:function: give the names of a module and a function")
