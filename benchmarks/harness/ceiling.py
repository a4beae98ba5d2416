"""What the memory of this device gives today: the copy of something much larger than its caches."""

from __future__ import annotations

import torch

from benchmarks.harness import clock, machine

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
