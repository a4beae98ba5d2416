"""How fast a run is: time by the parts of a step, floating-point operations, memory. Nobody waits for the device."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emd_fast.ops import flops

T = TypeVar("T")


class Laps:
    """A stopwatch for what `device` does: on a GPU by events in its stream, elsewhere by the host's clock.

        laps.start(); ...; laps.end("student"); ...; laps.end("e_step")
        laps.seconds()                                  # of the laps since the last start

    The events are made once and recorded again; only `seconds` waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._mark: Callable[[str], None] = self._record if device.type == "cuda" else self._read
        self._marks: dict[str, Any] = {}
        self._ended: list[str] = []

    def start(self) -> None:
        self._ended = []
        self._mark("")

    def end(self, lap: str) -> None:
        """The lap so named is over, and the next begins."""
        self._ended.append(lap)
        self._mark(lap)

    def seconds(self) -> dict[str, float]:
        """Seconds by lap, in their order; on a GPU, waits until it has finished the last one."""
        marks = [self._marks[name] for name in ("", *self._ended)] if self._ended else []
        return {lap: _between(first, last) for lap, first, last in zip(self._ended, marks[:-1], marks[1:], strict=True)}

    def _read(self, name: str) -> None:
        self._marks[name] = time.perf_counter()

    def _record(self, name: str) -> None:
        if name not in self._marks:
            self._marks[name] = torch.cuda.Event(enable_timing=True)
        self._marks[name].record()


def _between(first: Any, last: Any) -> float:
    if isinstance(first, float):
        return float(last - first)
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """The part of each lap in the sum of all, as `<lap>_share`; nothing where no time was taken."""
    total = sum(seconds.values())
    return {f"{lap}_share": value / total for lap, value in seconds.items()} if total > 0 else {}


def counted(call: Callable[[], T]) -> tuple[T, float]:
    """What `call` returns, and its floating-point operations on this device: those of matrix products, convolutions
    and attention, a multiplication and an addition counted as two. Others are not counted, nor is what a CUDA graph
    replays."""
    with _Counter() as counter:
        result = call()
    return result, counter.total


class _Counter(TorchDispatchMode):
    """PyTorch's formulas without its FlopCounterMode, whose hooks on modules do not bear autograd.grad to a leaf, as
    the E-step takes it."""

    def __init__(self) -> None:
        super().__init__()
        flops.register()
        from torch.utils.flop_counter import flop_registry

        self.formulas: dict[Any, Any] = flop_registry
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=result)
        return result


def peak_memory(device: torch.device) -> float:
    """Bytes: the most that PyTorch has held of this GPU, or that this process has held of the host's memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    # In KiB, except on macOS.
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
