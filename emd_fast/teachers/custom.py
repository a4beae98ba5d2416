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
    module_name, _, function_name = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"cannot import the teacher's module {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"the module {module_name!r} has no function {function_name!r} for a teacher")
    teacher = function()
    if not isinstance(teacher, Denoiser):
        raise ConfigError(f"{name} must return an emd_fast.Denoiser, got {type(teacher).__name__}")
    teacher.source = teacher.source or name
    return teacher
