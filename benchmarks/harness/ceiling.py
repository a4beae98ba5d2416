"""Measured ceilings of a device: bandwidth of a large copy and FLOP rate of a large matmul."""

from __future__ import annotations

import functools

import torch

from benchmarks.harness import clock, machine

_LEAST = {"cpu": 2**28, "cuda": 2**30}  # minimum bytes of the copied tensor
_SIDE = {"cpu": 512, "cuda": 8192}  # matrices are square


def copy_time(device: torch.device, rounds: int) -> tuple[clock.Timing, int]:
    """Returns the time of a large copy and the bytes that it reads and writes."""
    size = max(_LEAST[device.type], 4 * machine.cache_bytes(device))
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    taken = clock.measure({"copy": [lambda: target.copy_(source)]}, device, rounds).seconds
    return clock.Timing.of(taken["copy"]), 2 * source.numel() * source.element_size()


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """Returns the FLOP/s of a dense matmul of random matrices."""
    side = _SIDE[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    target = torch.empty_like(a)
    taken = clock.measure({"product": [lambda: torch.mm(a, b, out=target)]}, device, rounds).seconds
    return 2 * side**3 / clock.Timing.of(taken["product"]).median
