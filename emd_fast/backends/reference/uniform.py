from __future__ import annotations

from torch import Tensor

from emd_fast.backends.reference.philox import blocks, in_size, to_uniform


def uniform(size: list[int], noise: Tensor, stream: int, substep: int) -> Tensor:
    return in_size(to_uniform(blocks(size, noise, stream, substep)), size)
