"""CUDA streams of make-believe: everything runs on the CPU in the order in which it was queued, and what was read from
another stream without waiting for it is found."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Stream:
    """How much of every stream's work must have happened before what is queued here next."""

    def __init__(self) -> None:
        self.known: dict[Stream, int] = {self: 0}

    def wait_stream(self, other: Stream) -> None:
        for stream, time in other.known.items():
            self.known[stream] = max(self.known.get(stream, 0), time)


class Streams(TorchDispatchMode):
    """Notes which stream wrote each memory last, and the operators that read or write it too early in `races`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.made: list[Stream] = []
        self.current, self.races = Stream(), []
        self._written: dict[int, tuple[Stream, int]] = {}
        fakes = {"Stream": self._new, "stream": self._on, "current_stream": lambda: self.current}
        for name, value in {**fakes, "is_initialized": lambda: True}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def _new(self) -> Stream:
        self.made.append(Stream())
        return self.made[-1]

    @contextlib.contextmanager
    def _on(self, stream: Stream) -> Any:
        outer, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touched = [self._memory(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for memory in touched:
            stream, time = self._written.get(memory, (self.current, 0))
            if self.current.known.get(stream, 0) < time:
                self.races.append(str(func))
        result = func(*args, **kwargs)
        self.current.known[self.current] += 1
        made = [self._memory(leaf) for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        # A view has the memory of its argument, and writes nothing.
        written = [memory for memory in made if memory not in touched]
        if func._schema.is_mutable:
            written += touched
        for memory in written:
            self._written[memory] = self.current, self.current.known[self.current]
        return result

    @staticmethod
    def _memory(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()
