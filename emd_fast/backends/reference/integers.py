from __future__ import annotations

from torch import Tensor

from emd_fast.backends.reference.philox import blocks, in_size


def integers(high: int, size: list[int], noise: Tensor, stream: int, substep: int) -> Tensor:
    return in_size((blocks(size, noise, stream, substep) * high) >> 32, size)
