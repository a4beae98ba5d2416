from __future__ import annotations

import torch
from torch import Tensor

from emd_fast.backends.reference.common import wide
from emd_fast.backends.reference.langevin_eps import step
from emd_fast.backends.reference.normal import normal
from emd_fast.noise import NoiseStream


def langevin_z(
    z: Tensor, z_grad: Tensor, step_size: float, step_sizes: Tensor | None, noise: Tensor, substep: int
) -> None:
    gamma, root = step(step_size, step_sizes, z)
    m = normal(list(z.shape), noise, NoiseStream.LANGEVIN_Z, substep, torch.float32)
    z.copy_(z + gamma * (wide(z_grad) - z) + root * m)
