"""The change of a module's class by which it becomes a fused module.

The module stays the same object. Its new class is a subclass of the old one with the forward of
one of the kinds of this package. Parameters, buffers, hooks, names, isinstance and the class's
name stay (save_pretrained writes the name). A copy has the class of the original, so deepcopy
keeps what was fused. A forward bound to the instance would refer to the original instead. Pickles
name the kind and the original class. FSDP2 changes classes in the same way, and may do so before
or after fuse().
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from emd_fast.cache.weights import WEIGHT_CACHE
from emd_fast.ops.layers import MAX_HEAD_DIM

# The attribute with the settings of a fused module: plain values, which copies and pickles keep.
STATE = "_emd_fast"
_SUBCLASSES: dict[tuple[type, type], Any] = {}


class Fused:
    """Base of the kinds: which modules a kind is for, and how a fused module is copied."""

    does: ClassVar[str]
    """One line for the report."""

    if TYPE_CHECKING:  # it is a module besides, whose attributes are not known here
        forward: Callable[..., Any]

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def recognises(cls, module: Any) -> bool:
        """Whether this kind is for the module."""
        raise NotImplementedError

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """None, or why a module that it recognises must stay as it is."""
        return None

    @classmethod
    def note(cls, module: Any) -> str:
        """What the report says of the module."""
        return cls.does

    @classmethod
    def check(cls, module: Any) -> None:
        """Raises ValueError for a module of which no version can be right."""

    @classmethod
    def fuse(cls, module: Any, **state: Any) -> None:
        """Makes the module one of this kind."""
        module.__dict__[STATE] = state
        module.__class__ = _subclass(cls, type(module))

    @classmethod
    def unfuse(cls, module: Any) -> None:
        """Makes the module what it was."""
        module.__class__ = type(module)._emd_fast_base
        del module.__dict__[STATE]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        state = {key: None if key == WEIGHT_CACHE else value for key, value in reduced[2].items()}
        return _new, (self._emd_fast_kind, self._emd_fast_base), state, *reduced[3:]


def _construct(cls: Any, *args: Any, **kwargs: Any) -> Any:
    return cls._emd_fast_base(*args, **kwargs)


def _subclass(kind: Any, base: Any) -> Any:
    """The one subclass of this kind and base, whatever asks for it."""
    if (kind, base) in _SUBCLASSES:
        return _SUBCLASSES[kind, base]
    names = ("__module__", "__qualname__", "__doc__")
    attributes: dict[str, Any] = {name: getattr(base, name) for name in names}
    # LoRA builds new convolutions from the class of a layer. They must not be fused.
    attributes |= {"_emd_fast_kind": kind, "_emd_fast_base": base, "__new__": _construct}
    return _SUBCLASSES.setdefault((kind, base), type(base.__name__, (kind, base), attributes))


def _new(kind: type, base: type) -> nn.Module:
    subclass = _subclass(kind, base)
    return object.__new__(subclass)  # type: ignore[no-any-return]


def kind_of(module: nn.Module) -> type[Fused] | None:
    """The kind of a fused module, None for any other."""
    return getattr(type(module), "_emd_fast_kind", None)


def named(module: Any, name: str, package: str = "") -> type[nn.Module] | None:
    """The class of this name, defined in this package, that the module is of or inherits from."""
    for base in type(module).__mro__:
        if base.__name__ == name and (base.__module__ + ".").startswith(package) and issubclass(base, nn.Module):
            return base
    return None


def is_a(module: Any, name: str, package: str = "") -> bool:
    """Whether the module is of the class of this name and computes what that class computes.

    False for a subclass that overrides a method of it, for a forward set on the instance, and for
    a class whose forward was replaced.
    """
    base = named(module, name, package)
    if base is None or "forward" in vars(module):
        return False
    function = base.forward
    # A decorator of NVlabs is a class between, which has the name of the class that it decorates.
    defining = next(cls for cls in base.__mro__ if "forward" in vars(cls))
    below = type(module).__mro__[: type(module).__mro__.index(base)]
    return (
        not any(_overrides(cls, base) for cls in below)
        and type(module).forward is function
        and function.__module__ == defining.__module__
        and function.__qualname__ == f"{defining.__qualname__}.forward"
        and (defining is base or defining.__name__ == name)
    )


def _overrides(cls: type, base: type) -> bool:
    return any(callable(value) and name in vars(base) and name[:2] != "__" for name, value in vars(cls).items())


OVERRIDDEN = "its forward, or another method, is not that of the known class"


def unknown_attributes(module: Any, known: frozenset[str]) -> str | None:
    """Why a module with unknown public attributes is left, None if it has none."""
    tables = (vars(module), module._modules, module._parameters, module._buffers)
    unknown = sorted({name for table in tables for name in table if not name.startswith("_")} - known - _OF_MODULES)
    return f"it has attributes that are not known: {', '.join(unknown)}" if unknown else None


_OF_MODULES = frozenset(vars(nn.Module()))


def check_head_dim(head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention has a head_dim of {head_dim}, and ops.attention takes at most {MAX_HEAD_DIM}")


def has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)
