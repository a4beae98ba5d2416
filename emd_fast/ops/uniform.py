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
    """Uniform numbers in the open interval (0, 1), equal bit for bit on every backend and split.

    Args:
        size: (B, ...). Sample b of the batch has the global index `first_sample + b` of the noise.
        noise: seed, step, first sample and substep. The result is on its device.
        stream: the purpose of the numbers, in [0, 2^16). See `emd_fast.noise.NoiseStream`.
        substep: added to the substep of the noise. The sum must stay below 2^16.

    Returns:
        A float32 tensor of this size.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or a number outside its range.

    Source: Philox4x32-10, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
    """
    size = _check.size(size)
    return _op(size, _check.noise(noise, stream, substep, size[0]), stream, substep, backends.active())
