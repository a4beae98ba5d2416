from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from emd_fast import backends
from emd_fast.noise import Noise
from emd_fast.ops import _check
from emd_fast.ops._define import define

_op = define(
    "uniform",
    "SymInt[] size, Tensor noise, SymInt stream, SymInt substep",
    "Tensor",
    fake=lambda size, noise, stream, substep: noise.new_empty(size, dtype=torch.float32),
)


def uniform(size: Iterable[int], noise: Noise, *, stream: int, substep: int = 0) -> Tensor:
    """Uniform numbers strictly inside (0, 1), the same on every backend and for every split of the batch.

    Args:
        size: (B, ...); sample b of the batch is the global sample `first_sample + b` of the noise.
        noise: seed, step, first sample and substep; the result is on its device.
        stream: what the numbers are for, in [0, 2^16).
        substep: added to the substep of the noise; their sum is below 2^16.

    Returns:
        float32 of this size.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or a number outside its range.

    Source: Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    size = _check.size(size)
    return _op(size, _check.noise(noise, stream, substep, size[0]), stream, substep, backends.active())
