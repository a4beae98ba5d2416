"""Speed of a run: time by part of a step, floating-point operations, peak memory."""

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


class StepTimer:
    """Times the parts of a step: by CUDA events on a GPU, by the host's clock elsewhere.

        timer.start(); ...; timer.end("fake_score"); ...; timer.end("e_step")
        timer.seconds()                                 # of the parts since the last start

    The events are created once and recorded again in every step. Only `seconds` waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._mark: Callable[[str], None] = self._record if device.type == "cuda" else self._read
        self._marks: dict[str, Any] = {}
        self._ended: list[str] = []

    def start(self) -> None:
        self._ended = []
        self._mark("")

    def end(self, part: str) -> None:
        """Ends the part of this name and begins the next."""
        self._ended.append(part)
        self._mark(part)

    def seconds(self) -> dict[str, float]:
        """Seconds by part, in order. On a GPU, waits until the last part is finished."""
        marks = [self._marks[name] for name in ("", *self._ended)] if self._ended else []
        spans = zip(self._ended, marks[:-1], marks[1:], strict=True)
        return {part: _between(first, last) for part, first, last in spans}

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
    """Each part's fraction of the total, as `<part>_share`; empty where no time was measured."""
    total = sum(seconds.values())
    return {f"{part}_share": value / total for part, value in seconds.items()} if total > 0 else {}


def counted(call: Callable[[], T]) -> tuple[T, float]:
    """Runs `call` and counts its floating-point operations on this device.

    Matmuls, convolutions and attention are counted, with a multiply-add as two operations. Other
    operations are not counted, and neither are those that a CUDA graph replays.

    Returns:
        What `call` returned, and the number of operations.
    """
    with _Counter() as counter:
        result = call()
    return result, counter.total


class _Counter(TorchDispatchMode):
    """Applies PyTorch's FLOP formulas.

    FlopCounterMode itself cannot be used: its module hooks fail under autograd.grad to a leaf,
    which is how the E-step computes z_grad.
    """

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
    """Peak memory in bytes: PyTorch's allocations on a GPU, else this process's resident set."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    # ru_maxrss is in KiB, and in bytes on macOS.
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
