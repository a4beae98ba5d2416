from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from emd_fast import backends
from emd_fast.noise import Noise
from emd_fast.ops import _check
from emd_fast.ops._define import define

_op = define(
    "normal",
    "SymInt[] size, Tensor noise, SymInt stream, SymInt substep, ScalarType dtype",
    "Tensor",
    fake=lambda size, noise, stream, substep, dtype: noise.new_empty(size, dtype=dtype),
)


def normal(
    size: Iterable[int], noise: Noise, *, stream: int, substep: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal numbers, the same for every split of the batch.

    Args:
        size: (B, ...). Sample b of the batch has the global index `first_sample + b` of the noise.
        noise: seed, step, first sample and substep. The result is on its device.
        stream: the purpose of the numbers, in [0, 2^16). See `emd_fast.noise.NoiseStream`.
        substep: added to the substep of the noise. The sum must stay below 2^16.
        dtype: float32, bfloat16 or float16. The reduced types are rounded from float32.

    Returns:
        A tensor of this size and dtype. Every backend is within 5e-6 of exact arithmetic on the
        uniform numbers (in float32); backends may differ from each other within this bound.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or a number outside its range.

    Source: Philox4x32-10 (Salmon et al., SC 2011) and the Box-Muller transform (1958).
    """
    size = _check.size(size)
    state = _check.noise(noise, stream, substep, size[0])
    return _op(size, state, stream, substep, _check.dtype("dtype", dtype), backends.active())
