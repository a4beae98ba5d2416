"""Autotuning of launches, enabled by EMD_FAST_AUTOTUNE=1.

It serves element-wise kernels only. Their results do not depend on the tile, so ranks may choose
differently.
"""

import functools
import os
import statistics
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

CANDIDATES = tuple((tile, warps) for tile in (512, 1024, 2048, 4096) for warps in (2, 4, 8) if tile >= 128 * warps)
"""(elements, warps) of a program, with at least four elements per thread, one Philox block."""
_ROUNDS, _LAUNCHES = 5, 10

Choice = tuple[int, int]
_chosen: dict[Hashable, Choice] = {}


def wanted(device: torch.device) -> bool:
    """Whether to tune launches on this device.

    False during a graph capture, where a wait is illegal.
    """
    asked = os.environ.get("EMD_FAST_AUTOTUNE") == "1" and device.type == "cuda"
    return asked and not torch.cuda.is_current_stream_capturing()


def fastest(
    kernel: Any,
    args: tuple[Any, ...],
    launch: Callable[[tuple[Any, ...], Choice], None],
    device: torch.device,
) -> Choice:
    """Fastest candidate for these arguments, measured once per kernel, sizes, strides and dtypes.

    Args:
        kernel: a Triton function.
        args: the kernel's arguments. The measurement runs on copies, since the kernel may write
            them.
        launch: called as launch(args, candidate).
        device: device of the tensors.
    """
    key = (kernel.fn.__name__, _map(_facts, args))
    if key not in _chosen:
        copies = _map(_copy, args)
        times = [_seconds(functools.partial(launch, copies, choice), device) for choice in CANDIDATES]
        _chosen[key] = CANDIDATES[times.index(min(times))]
    return _chosen[key]


def _facts(leaf: Any) -> Any:
    """Properties of an argument that determine the time. The value of a number is none of them."""
    return (leaf.shape, leaf.stride(), leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf)


def _copy(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    # Copies the storage, so that the copy has the same strides, also for an expanded tensor.
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
