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
    """Standard normal numbers, the same on every backend and for every split of the batch.

    Args:
        size: (B, ...); sample b of the batch is the global sample `first_sample + b` of the noise.
        noise: seed, step, first sample and substep; the result is on its device.
        stream: what the numbers are for, in [0, 2^16).
        substep: added to the substep of the noise; their sum is below 2^16.
        dtype: float32, bfloat16 or float16 (rounded from float32).

    Returns:
        `dtype` of this size; float32 within 5e-6 of exact arithmetic on the uniform numbers.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or a number outside its range.

    Source: Philox4x32-10 (Salmon et al., SC 2011) and the transform of Box and Muller (1958).
    """
    size = _check.size(size)
    state = _check.noise(noise, stream, substep, size[0])
    return _op(size, state, stream, substep, _check.dtype("dtype", dtype), backends.active())
