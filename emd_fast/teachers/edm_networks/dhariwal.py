"""ADM, the UNet of Dhariwal and Nichol (arXiv 2105.05233), as EDM uses it for ImageNet-64."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from emd_fast.cache.conditioning import remember
from emd_fast.teachers.edm_networks import skeleton
from emd_fast.teachers.edm_networks.arguments import DhariwalArguments
from emd_fast.teachers.edm_networks.blocks import Block, Style, norm
from emd_fast.teachers.edm_networks.layers import no_labels, one_hot, positional_frequencies, waves

_HEAD = 64  # channels of a head of attention
_STYLE = Style(scale_shift=True, skip_scale=1.0, eps=1e-5, taps=(1.0, 1.0), always_project=False)


class DhariwalUNet(nn.Module):
    """network(x, c_noise, labels) -> (B, out_channels, H, W).

    x: (B, in_channels, H, W), H = W = img_resolution. c_noise: (B,). labels: (B,) int64 in [0,
    label_dim), label_dim for "none"; None where the network has no classes, or for "none".
    """

    def __init__(self, arguments: DhariwalArguments) -> None:
        super().__init__()
        a = self.arguments = arguments
        width = a.model_channels * a.channel_mult_emb
        # Labels of augmentations are 0 wherever images are made: their layer is there for the sake
        # of the names.
        self.map_augment = nn.Linear(a.augment_dim, a.model_channels, bias=False) if a.augment_dim else None
        self.map_layer0 = nn.Linear(a.model_channels, width)
        self.map_layer1 = nn.Linear(width, width)
        self.map_label = nn.Linear(a.label_dim, width, bias=False) if a.label_dim else None

        def block(
            in_channels: int, out_channels: int, *, decoder: bool, attention: bool = False, resample: str | None = None
        ) -> Block:
            heads = out_channels // _HEAD if attention else 0
            return Block(in_channels, out_channels, width, _STYLE, resample=resample, heads=heads)

        channels = a.channels[0]
        first = nn.Conv2d(a.in_channels, channels, 3, padding=1)
        self.enc, self.dec = skeleton.build(a, first, channels, block)
        self.out_norm = norm(channels, _STYLE.eps)
        self.out_conv = nn.Conv2d(channels, a.out_channels, 3, padding=1)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        embedded = remember((self.map_layer0, self.map_layer1, self.map_label), self._embed, c_noise, labels)
        h = skeleton.run(self.enc, self.dec, x.contiguous(memory_format=torch.channels_last), embedded)
        return self.out_conv(self.out_norm(h, activation="silu"))

    def _embed(self, c_noise: Tensor, labels: Tensor | None) -> Tensor:
        weight = self.map_layer0.weight
        frequencies = positional_frequencies(self.arguments.model_channels, endpoint=False, device=c_noise.device)
        embedded = self.map_layer1(silu(self.map_layer0(waves(c_noise, frequencies).to(weight.dtype))))
        if self.map_label is None:
            no_labels(labels)
        else:
            embedded = embedded + self.map_label(one_hot(labels, self.arguments.label_dim, len(c_noise), weight))
        return silu(embedded)
