"""What this device gives today: the copy of something much larger than its caches, and a large matrix product."""

from __future__ import annotations

import torch

from benchmarks.harness import clock, machine

_SIDE = {"cpu": 512, "cuda": 8192}  # of the factors
_LEAST = {"cpu": 2**28, "cuda": 2**30}  # bytes of the source


def copied(device: torch.device, rounds: int) -> tuple[clock.Timing, int]:
    """The time of a copy, and the bytes that it reads and writes."""
    size = max(_LEAST[device.type], 4 * machine.cache_bytes(device))
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    taken, _ = clock.readings({"copy": [lambda: target.copy_(source)]}, device, rounds)
    return clock.Timing.of(taken["copy"]), 2 * source.numel() * source.element_size()


def multiplied(device: torch.device, rounds: int) -> tuple[clock.Timing, float]:
    """The time of a dense product of two square matrices in bfloat16, and its operations."""
    side = _SIDE[device.type]
    # Random numbers: a GPU multiplies zeros at higher clocks.
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    product = torch.empty_like(left)
    taken, _ = clock.readings({"product": [lambda: torch.mm(left, right, out=product)]}, device, rounds)
    return clock.Timing.of(taken["product"]), 2.0 * side**3
