"""Launches chosen by measurement instead of by the frozen table, where EMD_FAST_AUTOTUNE=1 asks for it.

Only kernels whose every element stands alone: their numbers are the same in any tile, so ranks may choose differently.
"""

import functools
import os
import statistics
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

CANDIDATES = tuple((tile, warps) for tile in (512, 1024, 2048, 4096) for warps in (2, 4, 8) if tile >= 128 * warps)
"""(elements, warps) of a program: at least four elements a thread, a Philox block."""
_ROUNDS, _LAUNCHES = 5, 10

Choice = tuple[int, int]
_chosen: dict[Hashable, Choice] = {}


def wanted(device: torch.device) -> bool:
    """Whether a launch on this device may be measured now: not while a graph is captured, which a wait would break."""
    asked = os.environ.get("EMD_FAST_AUTOTUNE") == "1" and device.type == "cuda"
    return asked and not torch.cuda.is_current_stream_capturing()


def fastest(
    kernel: Any,
    args: tuple[Any, ...],
    launch: Callable[[tuple[Any, ...], Choice], None],
    device: torch.device,
) -> Choice:
    """The candidate that takes the least time for these arguments; measured once for their sizes, strides and dtypes.

    Args:
        kernel: a function of Triton.
        args: those of the kernel; tensors among them may be written, so copies of them are used.
        launch: launch(args, candidate).
        device: of the tensors.
    """
    key = (kernel.fn.__name__, _map(_facts, args))
    if key not in _chosen:
        copies = _map(_copy, args)
        times = [_seconds(functools.partial(launch, copies, choice), device) for choice in CANDIDATES]
        _chosen[key] = CANDIDATES[times.index(min(times))]
    return _chosen[key]


def _facts(leaf: Any) -> Any:
    """What a time depends on: not on the number of a substep."""
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)


def _copy(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    # With the storage, so that the copy has the same strides, those of an expanded tensor too.
    storage = leaf.untyped_storage().clone()
    return leaf.new_empty(0).set_(storage, leaf.storage_offset(), leaf.shape, leaf.stride())


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    return tuple(_map(function, item) for item in value) if isinstance(value, tuple) else function(value)


def _seconds(call: Callable[[], None], device: torch.device) -> float:
    times = []
    with torch.cuda.device(device):
        call()  # compiles
        for _ in range(_ROUNDS):
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            for _ in range(_LAUNCHES):
                call()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / _LAUNCHES)
    return statistics.median(times) * 1e-3
