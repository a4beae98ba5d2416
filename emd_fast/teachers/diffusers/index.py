"""model_index.json of a pipeline, checked: it is data, and names classes and folders.

The classes that the library loads are those that an architecture names. diffusers itself would look
any name up in its modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emd_fast.io.paths import is_part

_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
TEXT_PARTS = ("text", "tokenizer")  # first words of components: text_encoder_2, tokenizer


def checked(index: object) -> dict[str, Any]:
    """The index of a pipeline, if every entry has the form that diffusers writes.

    Raises:
        ValueError: another form, without the path: a component's name that is no single path part, a component that
            is not [library, class], another library, or a pipeline with code of its own.
    """
    if not isinstance(index, Mapping):
        raise ValueError("it holds no table of components")
    for name, value in index.items():
        if name == "_class_name":
            if value is not None and (not isinstance(value, str) or not value.isidentifier()):
                raise ValueError(f"_class_name is {_short(value)}: a pipeline with code of its own is not supported")
        elif isinstance(value, list):
            _check_component(name, value)
        elif not name.startswith("_") and not is_part(name):
            raise ValueError(f"it has an entry {_short(name)}, which is no name of a component")
    return dict(index)


def _check_component(name: str, value: list[Any]) -> None:
    if not is_part(name) or name.startswith("_"):
        raise ValueError(f"it has a component {_short(name)}, which is no single part of a path")
    match value:
        case [None, None]:
            return
        case [str() as library, str() as kind] if kind.isidentifier() and not kind.startswith("_"):
            if library in _LIBRARIES:
                return
            raise ValueError(
                f"its component {name} is a class of {_short(library)}: those of {', '.join(_LIBRARIES)} are supported"
            )
    raise ValueError(f"its component {name} is {_short(value)}, not [library, class]")


def class_of(index: Mapping[str, Any], component: str, library: str, classes: tuple[str, ...]) -> str:
    """The class that an index gives a component.

    Raises:
        ValueError: a class that is not one of these.
    """
    value = index.get(component)
    if not isinstance(value, list) or value[0] != library or value[1] not in classes:
        some = ", ".join(classes[:8]) + (" and others" if len(classes) > 8 else "")
        raise ValueError(f"its {component} is {_short(value)}, which is not supported: {some} of {library} are")
    return str(value[1])


def _short(value: object) -> str:
    return repr(value)[:100]
