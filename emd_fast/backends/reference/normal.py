from __future__ import annotations

import math

import torch
from torch import Tensor

from emd_fast.backends.reference.philox import blocks, in_size, to_uniform


def normal(size: list[int], noise: Tensor, stream: int, substep: int, dtype: torch.dtype) -> Tensor:
    # Box-Muller in float64: the rounding of an angle up to 2 pi to float32 would alone take half
    # of the permitted error of 5e-6.
    u0, u1, u2, u3 = to_uniform(blocks(size, noise, stream, substep)).double().unbind(-1)
    pairs = []
    for u_radius, u_angle in ((u0, u1), (u2, u3)):
        radius = torch.sqrt(-2 * torch.log(u_radius))
        angle = 2 * math.pi * u_angle
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return in_size(torch.stack(pairs, dim=-1).float(), size).to(dtype)
