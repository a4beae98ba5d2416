from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from emd_fast import backends
from emd_fast.noise import Noise
from emd_fast.ops import _check
from emd_fast.ops._define import define

_op = define(
    "integers",
    "SymInt high, SymInt[] size, Tensor noise, SymInt stream, SymInt substep",
    "Tensor",
    fake=lambda high, size, noise, stream, substep: noise.new_empty(size, dtype=torch.int64),
)


def integers(high: int, size: Iterable[int], noise: Noise, *, stream: int, substep: int = 0) -> Tensor:
    """Random integers below `high`, the same on every backend and for every split of the batch.

    Args:
        high: 1 <= high <= 2^31.
        size: (B, ...). Sample b of the batch has the global index `first_sample + b` of the noise.
        noise: seed, step, first sample and substep. The result is on its device.
        stream: the purpose of the numbers, in [0, 2^16). See `emd_fast.noise.NoiseStream`.
        substep: added to the substep of the noise. The sum must stay below 2^16.

    Returns:
        An int64 tensor of this size with values in [0, high).

    Raises:
        TypeError, ValueError: an argument of the wrong type, or a number outside its range.
    """
    size = _check.size(size)
    _check.integer("high", high)
    if high < 1 or high > 2**31:
        raise ValueError(f"high must be in [1, 2^31], got {high}")
    return _op(high, size, _check.noise(noise, stream, substep, size[0]), stream, substep, backends.active())
