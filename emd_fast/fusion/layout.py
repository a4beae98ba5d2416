"""The memory format of convolution weights, and of the images that a network is given.

On a GPU the fast kernels for convolutions read and write channels_last; a weight in another format
is copied in every pass, an activation before and after. On a CPU those of frozen weights do
(csrc/cpu/winograd.cpp), and group norms are faster so; oneDNN lays weights out as it likes in any
case. What a convolution returns has the format of its image, or of its weight: FSDP2 gathers
weights contiguous, hence the images too. The parameters stay the same objects, since optimizers
and averages hold them; their memory is another, which the moments of an optimizer that has made a
step do not follow.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Strides before, on the module that owns the weight.
_BEFORE = "_emd_fast_strides"


def set_layout(network: nn.Module, memory_format: torch.memory_format | str | None) -> None:
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            wanted = memory_format
            if memory_format == "auto":
                wanted = torch.channels_last if weight.is_cuda else None
            # A sharded weight is laid out by FSDP2; a meta tensor not at all.
            if (
                not isinstance(wanted, torch.memory_format)
                or weight.dim() != 4
                or type(weight) is not nn.Parameter
                or weight.is_meta
            ):
                continue
            if not weight.is_contiguous(memory_format=wanted):
                module.__dict__.setdefault(_BEFORE, {})[name] = weight.stride()
                weight.data = weight.data.contiguous(memory_format=wanted)


def name_of(memory_format: torch.memory_format | str | None) -> str | None:
    """Of images, by name: PyTorch's own objects cannot be pickled."""
    wanted = torch.channels_last if memory_format == "auto" else memory_format
    return None if wanted is None else str(wanted).removeprefix("torch.")


def of_images(x: Tensor, name: str | None) -> Tensor:
    return x if name is None or x.dim() != 4 else x.contiguous(memory_format=getattr(torch, name))


def restore(network: nn.Module) -> None:
    for module in network.modules():
        for name, strides in module.__dict__.pop(_BEFORE, {}).items():
            weight = getattr(module, name)
            weight.data = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device).copy_(
                weight.data
            )
