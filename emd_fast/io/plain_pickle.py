"""Pickles as data: an interpreter of the opcodes that hold plain values, which imports nothing and calls only its own.

A pickle is a program, and pickle.Unpickler runs it: what it names is imported, called, and written to. Here a name is a
word that is looked up in a table of the caller's; a word that is not in the table is refused before anything is done
with it. pickletools of the standard library cuts the file into opcodes, and executes none.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

_NEWEST = 5
_KEYS = (str, int, float, bool, type(None))  # of dicts and sets: the hash of a nested key would recurse into C


class PickleError(ValueError):
    """A file that is no pickle, is damaged, or asks for what is not data: one line."""


class Source(Protocol):
    """Where a pickle is read from: io.BytesIO and mmap, whose read(n) never allocates more than is there."""

    def read(self, n: int = ..., /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


class Name:
    """A global that the pickle names: a word, and the function of ours that stands for it."""

    __slots__ = ("make", "word")

    def __init__(self, word: str, make: Callable[..., Any]) -> None:
        self.word, self.make = word, make


class Built:
    """A value that may be given a state (BUILD), once. What the state means is up to who reads it."""

    state: Any = None

    def build(self, state: Any) -> None:
        if self.state is not None:
            raise PickleError(f"a state is given twice to {type(self).__name__}")
        self.state = state


def read(
    source: Source, names: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The value of the pickle at the position of `source`, which is left behind its last byte.

    Args:
        source: io.BytesIO or mmap.
        names: what the pickle may name, as "module name", and what is called with the arguments it gives. Names that
            are missing here are refused by name.
        persistent: takes a persistent identifier to its value; None refuses them.

    Returns:
        None, bool, int, float, str, bytes, and tuples, lists, dicts and sets of values; what `names` return; `Name`.

    Raises:
        PickleError: not a pickle, truncated, an opcode or name that is not allowed, or one that does not fit the stack.
    """
    machine = _Machine(names, persistent)
    at = source.tell()
    try:
        for opcode, argument, position in pickletools.genops(source):  # type: ignore[arg-type]
            at = position or 0
            machine.do(opcode.name, argument, at)
    except PickleError:
        raise
    except (IndexError, KeyError):
        raise PickleError(f"the pickle is damaged: at byte {at} it takes what is not there") from None
    except (ValueError, TypeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PickleError(f"not a whole pickle, or a damaged one, behind byte {at}: {reason[:200]}") from None
    return machine.value()


class _Machine:
    def __init__(self, names: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None) -> None:
        self._names, self._persistent = names, persistent
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each MARK
        self._memo: dict[int, Any] = {}

    def value(self) -> Any:
        if len(self._stack) != 1 or self._below:
            raise PickleError(f"the pickle is damaged: it ends with {len(self._stack)} values instead of 1")
        return self._stack[0]

    def do(self, opcode: str, argument: Any, at: int) -> None:
        if opcode in _VALUES:
            self._stack.append(argument)
        elif opcode in _CONSTANTS:
            self._stack.append(_CONSTANTS[opcode]())
        elif opcode in _TUPLES:
            count = _TUPLES[opcode]
            items = [self._stack.pop() for _ in range(count)]
            self._stack.append(tuple(reversed(items)))
        elif opcode in _ACTIONS:
            _ACTIONS[opcode](self, argument)
        elif opcode not in ("FRAME", "STOP"):
            said = f" {argument.replace(' ', '.')[:100]!r}" if isinstance(argument, str) else ""
            raise PickleError(f"the pickle uses {opcode}{said} at byte {at}, which holds no data: refused")

    # What the opcodes do ----------------------------------------------------------------------------------------------

    def _protocol(self, version: int) -> None:
        if version > _NEWEST:
            raise PickleError(f"the pickle is of protocol {version}, newer than {_NEWEST}")

    def _mark(self, _: None) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _to_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._below.pop()
        return items

    def _tuple(self, _: None) -> None:
        items = tuple(self._to_mark())
        self._stack.append(items)

    def _append(self, _: None) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._to_mark())

    def _extend(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _set_item(self, _: None) -> None:
        value = self._stack.pop()
        self._set([self._stack.pop(), value])

    def _set_items(self, _: None) -> None:
        self._set(self._to_mark())

    def _set(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise PickleError("the pickle is damaged: a key without a value")
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _add_items(self, _: None) -> None:
        items = self._to_mark()
        self._top(set).update(_key(item) for item in items)

    def _top(self, kind: type) -> Any:
        if type(self._stack[-1]) is not kind:
            raise PickleError(f"the pickle fills a {type(self._stack[-1]).__name__} as if it were a {kind.__name__}")
        return self._stack[-1]

    def _put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _get(self, index: int) -> None:
        self._stack.append(self._memo[index])

    def _global(self, argument: str) -> None:
        make = self._names.get(argument)
        if make is None:
            raise PickleError(f"the file asks for {argument.replace(' ', '.')[:200]!r}: refused, nothing was run")
        self._stack.append(Name(argument, make))

    def _stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError("the pickle names a global by what is not a string")
        self._global(f"{module} {name}")

    def _call(self, _: None) -> None:
        arguments, name = self._stack.pop(), self._stack.pop()
        if type(name) is not Name or type(arguments) is not tuple:
            raise PickleError(f"the pickle calls a {type(name).__name__} with a {type(arguments).__name__}: refused")
        try:
            self._stack.append(name.make(*arguments))
        except (TypeError, AttributeError):
            word = name.word.replace(" ", ".")
            raise PickleError(f"the pickle calls {word} with arguments of an unknown form") from None

    def _build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, Built):
            raise PickleError(f"the pickle gives a state to a {type(target).__name__}: refused")
        target.build(state)

    def _persistent_id(self, _: None) -> None:
        if self._persistent is None:
            raise PickleError("the pickle refers to something outside of it (BINPERSID): refused")
        self._stack.append(self._persistent(self._stack.pop()))


def _key(value: Any) -> Any:
    if type(value) not in _KEYS:
        raise PickleError(f"the pickle has a {type(value).__name__} as a key, expected a string or a number")
    return value


_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine._protocol,
    "MARK": _Machine._mark,
    "TUPLE": _Machine._tuple,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "ADDITEMS": _Machine._add_items,
    "BINPUT": _Machine._put,
    "LONG_BINPUT": _Machine._put,
    "MEMOIZE": _Machine._memoize,
    "BINGET": _Machine._get,
    "LONG_BINGET": _Machine._get,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._call,
    "NEWOBJ": _Machine._call,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent_id,
}
