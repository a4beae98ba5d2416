"""Pickles read as data: an interpreter of the opcodes that hold plain values.

A pickle is a program, and `pickle.Unpickler` runs it: it imports, calls and writes to what the
pickle names. Here a name is a word that is looked up in a table of the caller. A word that is not in
the table is refused before anything is done with it. `pickletools` of the standard library cuts the
file into opcodes, and executes none.

This is the one reader of pickles in the project. Time and memory are bounded by the size of the
file and by the limits below.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

Names = Mapping[str, Callable[..., Any]]

_NEWEST = 5
_MOST_OPCODES = 1_000_000  # a network of EDM has about 200 for each module
_LARGEST_NUMBER = 2**127  # a longer one costs time in every product
_LARGEST_KEY = 2**16  # larger integers can be chosen so that their hashes collide


class PickleError(ValueError):
    """A file that is no pickle, is damaged, or asks for what is not data: one line."""


class Source(Protocol):
    """Where a pickle is read from: io.BytesIO or mmap, whose read(n) never allocates more than is there."""

    def read(self, n: int = ..., /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...
    def seek(self, offset: int, whence: Literal[0, 2] = ..., /) -> Any: ...


class Name:
    """A global that the pickle names: its word, and the function of ours that stands for it."""

    __slots__ = ("make", "word")

    def __init__(self, word: str, make: Callable[..., Any]) -> None:
        self.word, self.make = word, make


class Built:
    """A value that may be given a state (BUILD), once. The reader of the value interprets the state."""

    state: Any = None

    def build(self, state: Any) -> None:
        if self.state is not None:
            raise PickleError(f"a state is given twice to {type(self).__name__}")
        self.state = state


def read(source: Source, names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """Reads the pickle at the position of `source`, and leaves `source` behind its last byte.

    Args:
        source: io.BytesIO or mmap.
        names: by "module name", a function that is called with the arguments which the pickle gives.
            Names that are missing here are refused by name.
        persistent: takes a persistent identifier to its value; None refuses them.

    Returns:
        None, bool, int, float, str, bytes, and tuples, lists, dicts and sets of values; what `names`
        return; `Name`.

    Raises:
        PickleError: not a pickle, truncated, beyond a limit, an opcode or name that is not allowed,
            or one that does not fit the stack.
    """
    at = start = source.tell()
    source.seek(0, 2)
    machine = _Machine(names, persistent, source.tell() - start)
    source.seek(start)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(source)):  # type: ignore[arg-type]
            at = position or 0
            if count == _MOST_OPCODES:
                raise PickleError(f"the pickle has more than {_MOST_OPCODES:,} opcodes: refused")
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
    """The stack and the memo of one pickle.

    Args:
        size: bytes of the file, as many as the calls together may make.
    """

    def __init__(self, names: Names, persistent: Callable[[Any], Any] | None, size: int) -> None:
        self._names, self._persistent, self._left = names, persistent, size
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each MARK
        self._memo: dict[int, Any] = {}

    def value(self) -> Any:
        if len(self._stack) != 1 or self._below:
            raise PickleError(f"the pickle is damaged: it ends with {len(self._stack)} values instead of 1")
        return self._stack[0]

    def do(self, opcode: str, argument: Any, at: int) -> None:
        stack = self._stack
        match opcode:
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINFLOAT":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8":
                stack.append(argument)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4":
                if abs(argument) >= _LARGEST_NUMBER:
                    raise PickleError(f"the pickle has a number of {argument.bit_length()} bits: refused")
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append(_CONSTANTS[opcode]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(int(opcode[-1]))]
                stack.append(tuple(reversed(items)))
            case "MARK":
                self._below.append(stack)
                self._stack = []
            case "TUPLE":
                self._stack = self._below.pop()
                self._stack.append(tuple(stack))
            case "SETITEM":
                value = stack.pop()
                self._set([stack.pop(), value])
            case "SETITEMS":
                self._stack = self._below.pop()
                self._set(stack)
            case "APPEND":
                value = stack.pop()
                self._top(list).append(value)
            case "APPENDS":
                self._stack = self._below.pop()
                self._top(list).extend(stack)
            case "ADDITEMS":
                self._stack = self._below.pop()
                self._top(set).update(map(_key, stack))
            case "GLOBAL":
                self._global(argument)
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise PickleError("the pickle names a global by what is not a string")
                self._global(f"{module} {name}")
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(self._called(stack.pop(), arguments))
            case "BUILD":
                state, target = stack.pop(), stack[-1]
                if not isinstance(target, Built):
                    raise PickleError(f"the pickle gives a state to a {type(target).__name__}: refused")
                target.build(state)
            case "BINPERSID":
                if self._persistent is None:
                    raise PickleError("the pickle refers to something outside of it (BINPERSID): refused")
                stack.append(self._persistent(stack.pop()))
            case "PROTO":
                if argument > _NEWEST:
                    raise PickleError(f"the pickle is of protocol {argument}, newer than {_NEWEST}")
            case "FRAME" | "STOP":
                pass
            case _:
                said = f" {argument.replace(' ', '.')[:100]!r}" if isinstance(argument, str) else ""
                raise PickleError(f"the pickle uses {opcode}{said} at byte {at}, which holds no data: refused")

    def _top(self, kind: type) -> Any:
        found = self._stack[-1]
        if type(found) is not kind:
            raise PickleError(f"the pickle fills a {type(found).__name__} as if it were a {kind.__name__}")
        return found

    def _set(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise PickleError("the pickle is damaged: a key without a value")
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def _global(self, word: str) -> None:
        make = self._names.get(word)
        if make is None:
            raise PickleError(f"the file asks for {word.replace(' ', '.')[:200]!r}: refused, nothing was run")
        self._stack.append(Name(word, make))

    def _called(self, name: Any, arguments: Any) -> Any:
        if type(name) is not Name or type(arguments) is not tuple:
            raise PickleError(f"the pickle calls a {type(name).__name__} with a {type(arguments).__name__}: refused")
        try:
            made = name.make(*arguments)
        except (TypeError, AttributeError):
            word = name.word.replace(" ", ".")
            raise PickleError(f"the pickle calls {word} with arguments of an unknown form") from None
        if type(made) is bytes:  # many calls with one long text of the memo
            self._left -= len(made)
            if self._left < 0:
                raise PickleError("the pickle makes more bytes than it has: refused")
        return made


def _key(value: Any) -> Any:
    # Nested keys would recurse in C when they are hashed.
    if type(value) not in (str, bool, type(None)) and (type(value) is not int or abs(value) > _LARGEST_KEY):
        raise PickleError(f"the pickle has a {type(value).__name__} as a key, expected a string or a small integer")
    return value


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
