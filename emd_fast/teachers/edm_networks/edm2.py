"""The magnitude-preserving UNet of EDM2 (Karras et al., arXiv 2312.02696).

Equation numbers are those of the paper.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from emd_fast.cache.conditioning import remember
from emd_fast.cache.layers import CastWeight
from emd_fast.cache.qkv_rows import by_part
from emd_fast.cache.weights import autocast_dtype, is_plain
from emd_fast.ops.convolution import convolution
from emd_fast.teachers.edm_networks import skeleton
from emd_fast.teachers.edm_networks.arguments import EDM2Arguments
from emd_fast.teachers.edm_networks.layers import (
    as_image,
    downsample,
    fir,
    is_box,
    no_labels,
    one_hot,
    pixel_attention,
    projected,
    unit_rms,
    upsample,
)

_EPS = 1e-4  # of every normalisation
_SILU_RMS = 0.596  # root mean square of silu(x) for x ~ N(0, 1)


class EDM2UNet(nn.Module):
    """network(x, c_noise, labels) -> (B, out_channels, H, W).

    x: (B, in_channels, H, W), H = W = img_resolution. c_noise: (B,). labels: (B,) int64 in [0,
    label_dim), label_dim for "none"; None where the network has no classes, or for "none".
    """

    def __init__(self, arguments: EDM2Arguments) -> None:
        super().__init__()
        a = self.arguments = arguments
        noise = a.channels[0] if a.channel_mult_noise is None else a.model_channels * a.channel_mult_noise
        width = max(a.channels) if a.channel_mult_emb is None else a.model_channels * a.channel_mult_emb
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = _Fourier(noise)
        self.emb_noise = MPConv(noise, width)
        self.emb_label = MPConv(a.label_dim, width) if a.label_dim else None

        def block(
            in_channels: int, out_channels: int, *, decoder: bool, attention: bool = False, resample: str | None = None
        ) -> _Block:
            heads = out_channels // a.channels_per_head if attention else 0
            return _Block(in_channels, out_channels, width, a, decoder=decoder, heads=heads, resample=resample)

        channels = a.channels[0]
        first = MPConv(
            a.in_channels + 1, channels, 3
        )  # a channel of ones stands in for biases, which there are none of
        self.enc, self.dec = skeleton.build(a, first, channels, block)
        self.out_conv = MPConv(channels, a.out_channels, 3)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        embedded = remember((self.emb_fourier, self.emb_noise, self.emb_label), self._embed, c_noise, labels)
        h = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).contiguous(memory_format=torch.channels_last)
        h = skeleton.run(self.enc, self.dec, h, embedded, lambda h, skip: _cat(h, skip, self.arguments.concat_balance))
        return self.out_conv(h, self.out_gain)

    def _embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        weight = self.emb_noise.weight
        embedded = self.emb_noise(self.emb_fourier(c_noise).to(weight.dtype))
        if self.emb_label is None:
            no_labels(labels)
        else:
            classes = self.arguments.label_dim
            label = self.emb_label(math.sqrt(classes) * one_hot(labels, classes, len(c_noise), weight))
            embedded = _sum(embedded, label, self.arguments.label_balance)
        return _silu(embedded)


class MPConv(CastWeight, nn.Module):
    """A convolution, or a linear layer where `kernel` is 0, whose filters have unit norm in use (equation 47).

    In train mode the weight itself is normalised before it is used (equation 66), which keeps its
    learning rate from falling as it grows; `EMDTrainer` keeps networks in eval mode, where it is
    left as it is.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 0) -> None:
        super().__init__()
        self.start_cache()
        size = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *size))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.in_use(x.dtype, gain)
        if weight.dim() == 2:
            return linear(x, weight)
        return convolution(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2))

    def in_use(self, dtype: torch.dtype, gain: Tensor | float = 1.0) -> Tensor:
        """The weight as products of this dtype take it: filters of unit norm, times `gain`."""
        own: Tensor = self.weight
        dtype = autocast_dtype(own.device.type) or dtype
        prepared = self._emd_fast_weight_cache
        weight = None if prepared is None else prepared.get("normalised")
        wanted = torch.is_grad_enabled() and own.requires_grad
        if weight is None or wanted or isinstance(gain, Tensor) or gain != 1 or weight.dtype not in (dtype, own.dtype):
            if self.training:
                with torch.no_grad():
                    own.copy_(unit_rms(own.float(), _filter_dims(own), _EPS))
            weight = _normalised(own, gain)
        return weight.to(dtype)

    def prepare(self) -> dict[str, Tensor]:
        """The normalised weight, which is the same in every pass of an E-step."""
        parameter = self._parameters["weight"]
        if parameter is None or not is_plain(parameter):
            return {}
        weight = _normalised(parameter.detach(), 1.0)
        return {"normalised": weight.to(autocast_dtype(weight.device.type) or weight.dtype)}


def _filter_dims(weight: Tensor) -> tuple[int, ...]:
    return tuple(range(1, weight.dim()))


def _normalised(weight: Tensor, gain: Tensor | float) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return unit_rms(wide, _filter_dims(wide), _EPS) * (gain / math.sqrt(weight[0].numel()))


class _Block(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding: int,
        arguments: EDM2Arguments,
        *,
        decoder: bool,
        heads: int,
        resample: str | None,
    ) -> None:
        super().__init__()
        self.decoder, self.heads, self.resample, self.arguments = decoder, heads, resample, arguments
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(in_channels if decoder else out_channels, out_channels, 3)
        self.emb_linear = MPConv(embedding, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1) if heads else None
        self.attn_proj = MPConv(out_channels, out_channels, 1) if heads else None

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.modulated(x, self.condition(embedded))

    def condition(self, embedded: Tensor) -> Tensor:
        """The gains of the block, computed once inside conditioning_cache."""
        gains: Tensor = remember(self.emb_linear, self.emb_linear, embedded, gain=self.emb_gain)
        return gains

    def modulated(self, x: Tensor, gain: Tensor) -> Tensor:
        """The output for x and what `condition` returns."""
        x = self._resampled(x)
        if not self.decoder:
            x = unit_rms(x if self.conv_skip is None else self.conv_skip(x), 1, _EPS)
        h = self.conv_res0(_silu(x))
        h = self.conv_res1(_silu(h * (gain + 1)[:, :, None, None].to(h.dtype)))
        if self.decoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = _sum(x, h, self.arguments.res_balance)
        if self.attn_qkv is not None and self.attn_proj is not None:
            weight = by_part(self.attn_qkv.in_use(x.dtype), self.heads)
            mixed = pixel_attention(projected(x, self.heads, weight), unit=_EPS)
            mixed = linear(mixed, self.attn_proj.in_use(mixed.dtype).flatten(1))
            x = _sum(x, as_image(mixed, x), self.arguments.attn_balance)
        clip = self.arguments.clip_act
        return x if clip is None else x.clamp(-clip, clip)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        taps = tuple(self.arguments.resample_filter)
        resample = upsample if self.resample == "up" else downsample
        return resample(x, None if is_box(taps) else _fir_on(taps, x.device))


class _Fourier(nn.Module):
    """Random Fourier features of the noise level, of unit magnitude (equation 75)."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c_noise: Tensor) -> Tensor:
        angles = c_noise.float()[:, None] * self.freqs.float() + self.phases.float()
        return math.sqrt(2) * angles.cos()


@functools.cache
def _fir_on(taps: tuple[float, ...], device: torch.device) -> Tensor:
    """The filter on a device. It is copied once, since a copy in every pass would wait."""
    return fir(taps).to(device)


def _silu(x: Tensor) -> Tensor:
    return silu(x) / _SILU_RMS


def _sum(a: Tensor, b: Tensor, share: float) -> Tensor:
    """(1 - share) a + share b, with the magnitude of independent a and b (equation 88)."""
    return torch.add((1 - share) * a, b, alpha=share) / math.hypot(1 - share, share)


def _cat(a: Tensor, b: Tensor, share: float) -> Tensor:
    """a and b side by side, each contributing by its share whatever its channels (equation 103)."""
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - share) ** 2 + share**2))
    return torch.cat([a * (scale * (1 - share) / math.sqrt(n_a)), b * (scale * share / math.sqrt(n_b))], dim=1)
