"""Latents as tokens: 2x2 patches, position ids, statistics of a VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emd_fast.teachers.diffusers.architectures.form import Architecture


class PackedImage(Architecture):
    """Base class: images whose latents the network takes in 2x2 patches, with its time in its own dtype."""

    patch = (1, 2, 2)
    size = (1, 128, 128)

    @property
    def channels(self) -> int:
        return int(self.config["in_channels"]) // 4

    @property
    def returned(self) -> int:
        return int(self.config.get("out_channels") or self.config["in_channels"]) // 4

    def heard(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        # The network multiplies by 1000 in its dtype.
        return (t.to(dtype) * 1000).float() / 1000


def packed(x: Tensor) -> Tensor:
    """Packs latents (B, C, H, W) in 2x2 patches to tokens (B, H W / 4, 4 C)."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpacked(tokens: Tensor, like: Tensor) -> Tensor:
    """The inverse of `packed`, to the shape of `like` (B, C, H, W)."""
    b, c, h, w = like.shape
    return tokens.reshape(b, h // 2, w // 2, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, h, w)


def grid_ids(like: Tensor) -> Tensor:
    """Position ids (H W / 4, 3) of the patches of latents (B, C, H, W): 0, row, column."""
    height, width = like.shape[-2] // 2, like.shape[-1] // 2
    rows = torch.arange(height, device=like.device).repeat_interleave(width)
    columns = torch.arange(width, device=like.device).repeat(height)
    return torch.stack([torch.zeros_like(rows), rows, columns], 1).to(like.dtype)


def standardized(latents: Tensor, mean: Any, std: Any) -> Tensor:
    """latents std + mean, for (C,) numbers or tensors."""
    shape = (1, -1, *[1] * (latents.dim() - 2))
    return latents * torch.as_tensor(std).to(latents).view(shape) + torch.as_tensor(mean).to(latents).view(shape)


def rescaled(guided: Tensor, conditional: Tensor) -> Tensor:
    """The guided output with the norm of the conditional one along the last dimension."""
    norms = conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
    return guided * norms
