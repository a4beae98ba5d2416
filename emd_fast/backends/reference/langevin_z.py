from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.backends.reference.common import wide
from emd_fast.backends.reference.langevin_eps import resolve_step_size
from emd_fast.backends.reference.normal import normal
from emd_fast.noise import NoiseStream


def langevin_z(
    z: Tensor,
    z_grad: Tensor,
    step_size: float,
    step_size_per_sample: Tensor | None,
    exact: bool,
    noise: Tensor,
    substep: int,
) -> None:
    step, noise_scale = resolve_step_size(step_size, step_size_per_sample, exact, z)
    m = normal(list(z.shape), noise, NoiseStream.LANGEVIN_Z, substep, torch.float32)
    z.copy_(z + step * (wide(z_grad) - z) + noise_scale * m)
