"""DDPM++ and NCSN++, the UNets of Song et al. (arXiv 2011.13456), as EDM uses them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from emd_fast.cache.conditioning import remember
from emd_fast.teachers.edm_networks import skeleton
from emd_fast.teachers.edm_networks.arguments import SongArguments
from emd_fast.teachers.edm_networks.blocks import Block, ResampledConv, Style, norm
from emd_fast.teachers.edm_networks.layers import no_labels, one_hot, positional_frequencies, waves

_EPS = 1e-6


class SongUNet(nn.Module):
    """network(x, c_noise, labels) -> (B, out_channels, H, W).

    x: (B, in_channels, H, W), H = W = img_resolution. c_noise: (B,). labels: (B,) int64 in [0,
    label_dim), label_dim for "none"; None where the network has no classes, or for "none".
    """

    def __init__(self, arguments: SongArguments) -> None:
        super().__init__()
        a = self.arguments = arguments
        width, noise = a.model_channels * a.channel_mult_emb, a.model_channels * a.channel_mult_noise
        style = Style(
            scale_shift=False,
            skip_scale=math.sqrt(0.5),
            eps=_EPS,
            taps=tuple(a.resample_filter),
            always_project=True,
        )
        self.map_noise = _Noise(noise, a.embedding_type)
        self.map_label = nn.Linear(a.label_dim, noise) if a.label_dim else None
        # Labels of augmentations are 0 wherever images are made: their layer is there for the sake
        # of the names.
        self.map_augment = nn.Linear(a.augment_dim, noise, bias=False) if a.augment_dim else None
        self.map_layer0 = nn.Linear(noise, width)
        self.map_layer1 = nn.Linear(width, width)

        def block(
            in_channels: int, out_channels: int, *, decoder: bool, attention: bool = False, resample: str | None = None
        ) -> Block:
            return Block(in_channels, out_channels, width, style, resample=resample, heads=int(attention))

        first = nn.Conv2d(a.in_channels, a.model_channels, 3, padding=1)
        self.enc, self.dec = skeleton.build(a, first, a.model_channels, block, attend_every=False)
        self._add_paths_of_the_image(style)

    def _add_paths_of_the_image(self, style: Style) -> None:
        """Adds the paths from the image to the encoder levels and from the decoder levels to it."""
        a, aux = self.arguments, self.arguments.in_channels
        # A block that halves the resolution returns the channels of the level above.
        for r, channels in zip(a.resolutions[1:], a.channels, strict=False):
            at = f"{r}x{r}"
            if a.encoder_type == "skip":
                self.enc[f"{at}_aux_down"] = ResampledConv(aux, aux, 0, "down", style.taps)
                self.enc[f"{at}_aux_skip"] = nn.Conv2d(aux, channels, 1)
            elif a.encoder_type == "residual":
                self.enc[f"{at}_aux_residual"] = ResampledConv(aux, channels, 3, "down", style.taps, filter_last=True)
                aux = channels
        for level, (r, channels) in enumerate(zip(a.resolutions, a.channels, strict=True)):
            at = f"{r}x{r}"
            if a.decoder_type == "skip" and level < len(a.channels) - 1:
                self.dec[f"{at}_aux_up"] = ResampledConv(a.out_channels, a.out_channels, 0, "up", style.taps)
            if a.decoder_type == "skip" or level == 0:
                self.dec[f"{at}_aux_norm"] = norm(channels, _EPS)
                self.dec[f"{at}_aux_conv"] = nn.Conv2d(channels, a.out_channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        layers = (self.map_noise, self.map_layer0, self.map_layer1, self.map_label)
        embedded = remember(layers, self._embed, c_noise, labels)
        h, skips = self._encode(x.contiguous(memory_format=torch.channels_last), embedded)
        return self._decode(h, skips, embedded)

    def _embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        weight = next(self.parameters())
        embedded = self.map_noise(c_noise).to(weight.dtype)
        if self.map_label is None:
            no_labels(labels)
        else:
            classes = self.arguments.label_dim
            embedded = embedded + self.map_label(math.sqrt(classes) * one_hot(labels, classes, len(c_noise), weight))
        return silu(self.map_layer1(silu(self.map_layer0(embedded))))

    def _encode(self, x: Tensor, embedded: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, aux, skips = x, x, []
        for level, r in enumerate(self.arguments.resolutions):
            at = f"{r}x{r}"
            h = self.enc[f"{at}_down"](h, embedded) if level else self.enc[f"{at}_conv"](h)
            if level and self.arguments.encoder_type == "skip":
                aux = self.enc[f"{at}_aux_down"](aux)
                h = h + self.enc[f"{at}_aux_skip"](aux)
            elif level and self.arguments.encoder_type == "residual":
                h = aux = (h + self.enc[f"{at}_aux_residual"](aux)) / math.sqrt(2)
            skips.append(h)
            for i in range(self.arguments.num_blocks):
                h = self.enc[f"{at}_block{i}"](h, embedded)
                skips.append(h)
        return h, skips

    def _image(self, at: str, h: Tensor) -> Tensor:
        return self.dec[f"{at}_aux_conv"](self.dec[f"{at}_aux_norm"](h, activation="silu"))

    def _decode(self, h: Tensor, skips: list[Tensor], embedded: Tensor) -> Tensor:
        image: Tensor | None = None
        for r in reversed(self.arguments.resolutions):
            at = f"{r}x{r}"
            for name in (f"{at}_in0", f"{at}_in1", f"{at}_up"):
                if name in self.dec:
                    h = self.dec[name](h, embedded)
            for i in range(self.arguments.num_blocks + 1):
                h = self.dec[f"{at}_block{i}"](torch.cat([h, skips.pop()], dim=1), embedded)
            if f"{at}_aux_up" in self.dec:
                image = self.dec[f"{at}_aux_up"](image)
            if f"{at}_aux_conv" in self.dec:
                part = self._image(at, h)
                image = part if image is None else part + image
        assert image is not None
        return image


class _Noise(nn.Module):
    """The noise level (B,) as (B, channels) sines, then cosines, float32."""

    freqs: Tensor

    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.channels, self.kind = channels, kind
        if kind == "fourier":
            self.register_buffer("freqs", 16 * torch.randn(channels // 2))

    def forward(self, c_noise: Tensor) -> Tensor:
        if self.kind == "fourier":
            frequencies = 2 * math.pi * self.freqs.float()
        else:
            frequencies = positional_frequencies(self.channels, endpoint=True, device=c_noise.device)
        return waves(c_noise, frequencies).unflatten(1, (2, -1)).flip(1).flatten(1)
