"""The residual block of DDPM++, NCSN++ and ADM, and its convolution with a FIR filter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from emd_fast.cache.conditioning import remember
from emd_fast.cache.layers import CastWeight, QKVWeight, can_pack, cast_parameter
from emd_fast.ops.biases import convolved, convolved_and_added, remember_added, without_bias
from emd_fast.ops.convolution import convolution
from emd_fast.ops.layers import GroupNorm, residual
from emd_fast.teachers.edm_networks.layers import (
    as_image,
    called,
    downsample,
    fir,
    is_bare,
    is_box,
    pixel_attention,
    projected,
    upsample,
)


@dataclass(frozen=True)
class Style:
    """What differs between the families.

    Args:
        scale_shift: the embedding scales and shifts after the second norm (ADM), or is added
            before it (Song).
        skip_scale: of the sum of a branch and what it started from.
        eps: of the norms.
        taps: of the filter that up- and downsampling smooths with.
        always_project: a 1x1 convolution beside every block that resamples, not only where the
            channels change.
    """

    scale_shift: bool
    skip_scale: float
    eps: float
    taps: tuple[float, ...]
    always_project: bool


class ResampledConv(CastWeight, nn.Module):
    """A convolution after up- or downsampling; with kernel 0 the resampling alone.

    Args:
        resample: "up" or "down".
        filter_last: convolve the larger image, then smooth and thin out (NCSN++'s residual
            encoder); "down" only.
    """

    rounds = ("weight", "bias")
    bias = cast_parameter("bias")
    resample_filter: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        resample: str,
        taps: Sequence[float],
        *,
        bias: bool = True,
        filter_last: bool = False,
    ) -> None:
        super().__init__()
        self.start_cache()
        self.resample, self.filter_last, self.box = resample, filter_last, is_box(taps)
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(torch.empty(shape)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel and bias else None
        self.register_buffer("resample_filter", fir(taps))
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, out_channels, 2H or H/2, 2W or W/2) of x (B, in_channels, H, W)."""
        return self._convolved(x, self.bias)

    def adds_bias(self) -> bool:
        """Whether the bias must be added inside: see emd_fast.ops.biases."""
        return self.filter_last

    def without_bias(self, x: Tensor) -> Tensor:
        """As the module itself, without the bias."""
        return self._convolved(x, None)

    def _convolved(self, x: Tensor, bias: Tensor | None) -> Tensor:
        kernel = None if self.box else self.resample_filter
        if self.filter_last and self.weight is not None:
            # Padded by what both need, so that the border is that of one filter on an image with
            # zeros around it.
            margin = self.weight.shape[-1] // 2 + (self.resample_filter.shape[-1] - 1) // 2
            wide = conv2d(x, self.weight, padding=margin)
            y = downsample(wide, kernel, padding=0)
            return y if bias is None else y + bias[:, None, None].to(y.dtype)
        resample = upsample if self.resample == "up" else downsample
        x = resample(x, kernel)
        return x if self.weight is None else conv2d(x, self.weight, bias, padding=self.weight.shape[-1] // 2)


def norm(channels: int, eps: float) -> GroupNorm:
    """32 groups, or fewer where a group would have fewer than 4 channels."""
    return GroupNorm(max(1, min(32, channels // 4)), channels, eps)


class QKVConv(QKVWeight, nn.Conv2d):
    """A 1x1 convolution to queries, keys and values."""

    rounds = ("weight", "bias")
    bias = cast_parameter("bias")

    def __new__(cls, *args: Any, heads: int | None = None, **kwargs: Any) -> Any:
        # LoRA builds its own convolutions from the class of this one. Copies are made without
        # arguments.
        plain = heads is None and (args or kwargs)
        return nn.Conv2d(*args, **kwargs) if plain else super().__new__(cls)

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__(channels, 3 * channels, 1)
        self.start_cache()
        self.heads = heads

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolution(input, weight, bias)


class Block(nn.Module):
    """The residual block of EDM: norm, SiLU and convolution twice, a skip, optional attention.

    Args:
        embedding: width of the embedding.
        resample: "up", "down" or None.
        heads: of attention; 0 for none.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        style: Style,
        *,
        resample: str | None = None,
        heads: int = 0,
    ) -> None:
        super().__init__()
        self.out_channels, self.style, self.heads = out_channels, style, heads
        self.norm0 = norm(in_channels, style.eps)
        self.affine = nn.Linear(embedding, out_channels * (2 if style.scale_shift else 1))
        self.norm1 = norm(out_channels, style.eps)
        self.conv1 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip: nn.Module | None = None
        self.conv0: nn.Module
        if resample is None:
            self.conv0 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
            if in_channels != out_channels:
                self.skip = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.conv0 = ResampledConv(in_channels, out_channels, 3, resample, style.taps)
            kernel = 1 if style.always_project or in_channels != out_channels else 0
            self.skip = ResampledConv(in_channels, out_channels, kernel, resample, style.taps)
        if heads:
            self.norm2 = norm(out_channels, style.eps)
            self.qkv = QKVConv(out_channels, heads=heads)
            self.proj = nn.Conv2d(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(B, out_channels, H', W') of x (B, in_channels, H, W) and the embedding (B, embedding)."""
        return self.modulated(x, self.condition(embedded))

    def condition(self, embedded: Tensor) -> Tensor:
        """What the block makes of the embedding, computed once inside conditioning_cache."""
        if self.style.scale_shift:
            made: Tensor = remember(self.affine, self.affine, embedded)
            return made
        return remember_added(self.affine, self.conv0, self.affine, embedded)

    def modulated(self, x: Tensor, modulation: Tensor) -> Tensor:
        """The output for x and what `condition` returns."""
        h = self.norm0(x, activation="silu")
        if self.style.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h, add = convolved_and_added(self.conv0, h)
            h = self.norm1(h, add=add, scale=scale, shift=shift, activation="silu")
        else:
            h = self.norm1(without_bias(self.conv0, h), add=modulation, activation="silu")
        h, bias = convolved(self.conv1, h)
        x, skip_bias = (x, None) if self.skip is None else convolved(self.skip, x)
        h = residual(h, x, bias, skip_bias, self.style.skip_scale)
        return self._attend(h) if self.heads else h

    def _attend(self, h: Tensor) -> Tensor:
        x = self.norm2(h)
        if can_pack(self.qkv):
            weight, bias = self.qkv.packed("weight"), self.qkv.packed("bias")
            assert weight is not None
            tokens = projected(x, self.heads, weight, bias)
        else:
            tokens = called(self.qkv, x, self.heads)
        mixed = pixel_attention(tokens)
        if is_bare(self.proj):
            y = as_image(linear(mixed, self.proj.weight.flatten(1), self.proj.bias), h)
        else:
            y = self.proj(as_image(mixed, h))
        return residual(y, h, scale=self.style.skip_scale)
