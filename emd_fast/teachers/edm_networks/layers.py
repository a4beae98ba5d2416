"""Shared by the UNets of EDM and EDM2: FIR resampling, attention, labels, noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d, conv_transpose2d, interpolate, linear

from emd_fast.ops.layers import attention
from emd_fast.teachers.labels import check_labels


def fir(taps: Sequence[float]) -> Tensor:
    """The separable filter (1, 1, n, n) float32 of these taps, of sum 1."""
    row = torch.tensor(taps, dtype=torch.float32)
    return torch.outer(row, row)[None, None] / row.sum() ** 2


def is_box(taps: Sequence[float]) -> bool:
    """Whether the filter is the mean of 2x2 pixels, which has operations faster than a convolution."""
    return len(taps) == 2 and taps[0] == taps[1]


def upsample(x: Tensor, kernel: Tensor | None) -> Tensor:
    """(B, C, 2H, 2W): zeros between the pixels of x (B, C, H, W), smoothed by the kernel (1, 1, n, n). None: a box."""
    if kernel is None:
        return interpolate(x, scale_factor=2.0, mode="nearest")
    weight = (4 * kernel).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    return conv_transpose2d(x, weight, groups=x.shape[1], stride=2, padding=(kernel.shape[-1] - 1) // 2)


def downsample(x: Tensor, kernel: Tensor | None, padding: int | None = None) -> Tensor:
    """(B, C, H/2, W/2): x (B, C, H, W) smoothed by the kernel (1, 1, n, n), every second pixel. None: a box."""
    if kernel is None:  # which needs no padding
        return avg_pool2d(x, 2)
    padding = (kernel.shape[-1] - 1) // 2 if padding is None else padding
    weight = kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
    return conv2d(x, weight, groups=x.shape[1], stride=2, padding=padding)


def projected(x: Tensor, heads: int, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """q, k and v of the pixels of x (B, C, H, W): (B, H W, 3, heads, C / heads).

    Args:
        weight, bias: (3C, C) and (3C,) or None, rows as `emd_fast.cache.qkv_rows.by_part` has
            them.
    """
    return linear(x.flatten(2).transpose(1, 2), weight, bias).unflatten(2, (3, heads, -1))


def called(qkv: nn.Module, x: Tensor, heads: int) -> Tensor:
    """The same by a call of the module, with what hangs on it."""
    y: Tensor = qkv(x)
    return y.flatten(2).unflatten(1, (heads, -1, 3)).permute(0, 4, 3, 1, 2).contiguous()


def is_bare(layer: nn.Module) -> bool:
    """Whether weight and bias say all that the convolution does: no adapter around it, no hook."""
    return type(layer).forward is nn.Conv2d.forward and not (layer._forward_hooks or layer._forward_pre_hooks)


def pixel_attention(tokens: Tensor, unit: float | None = None) -> Tensor:
    """Self-attention over the pixels, (B, H W, C), before the last projection.

    Args:
        tokens: q, k and v, (B, H W, 3, heads, C / heads).
        unit: where given, each q, k and v is divided by its root mean square plus this (EDM2).
    """
    if unit is not None:
        tokens = unit_rms(tokens, -1, unit)
    q, k, v = tokens.unbind(2)
    return attention(q, k, v).flatten(2)


def as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """Tokens (B, H W, C) as (B, C, H, W), without a copy: channels_last in memory."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


def unit_rms(x: Tensor, dim: int | tuple[int, ...], eps: float) -> Tensor:
    """x / (eps + root mean square over dim), the mean square in float32 or float64."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (eps + norm * math.sqrt(norm.numel() / max(x.numel(), 1))).to(x.dtype)


def waves(c_noise: Tensor, frequencies: Tensor) -> Tensor:
    """cos and sin (B, 2n) float32 of the noise level (B,) times the frequencies (n,)."""
    angles = c_noise.float()[:, None] * frequencies.float()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def positional_frequencies(channels: int, *, endpoint: bool, device: torch.device) -> Tensor:
    """(channels / 2,) float32, falling geometrically from 1 to 1 / 10000 (`endpoint`) or to just above it."""
    count = channels // 2
    steps = torch.arange(count, dtype=torch.float32, device=device) / (count - 1 if endpoint else count)
    return (1 / 10000) ** steps


def one_hot(labels: Tensor | None, classes: int, batch: int, like: Tensor) -> Tensor:
    """(B, classes), dtype and device of `like`: a row of zeros where the label is `classes`, or for None.

    Raises:
        ValueError: labels of a wrong shape or, of CPU tensors, outside [0, classes]. TypeError:
            labels not int64.
    """
    if labels is None:
        return like.new_zeros(batch, classes)
    check_labels(labels, batch, classes, none=True)
    return (labels[:, None] == torch.arange(classes, device=labels.device)).to(like.dtype)


def no_labels(labels: Tensor | None) -> None:
    """Refuses labels for a network without classes."""
    if labels is not None:
        raise ValueError("this network has no classes: labels must be None")
