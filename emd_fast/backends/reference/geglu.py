from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu

from emd_fast.backends.reference.common import wide


def geglu(packed: Tensor) -> Tensor:
    values, gates = wide(packed).chunk(2, dim=-1)
    return (values * gelu(gates)).to(packed.dtype).contiguous()


def geglu_backward(grad: Tensor, packed: Tensor) -> Tensor:
    values, gates = wide(packed).chunk(2, dim=-1)
    grad = wide(grad)
    gradients = [grad * gelu(gates), torch.ops.aten.gelu_backward(grad * values, gates)]
    return torch.cat(gradients, dim=-1).to(packed.dtype).contiguous()


def gelu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of GELU."""
    density = torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * density, density * (2 - x * x)
