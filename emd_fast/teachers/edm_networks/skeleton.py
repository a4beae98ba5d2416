"""The shape that all three UNets have, and the names of its parts in the checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from emd_fast.teachers.edm_networks.arguments import UNetArguments


class MakeBlock(Protocol):
    """Makes a residual block; resample is "up", "down" or None."""

    def __call__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        decoder: bool,
        attention: bool = False,
        resample: str | None = None,
    ) -> nn.Module: ...


def build(
    arguments: UNetArguments, first: nn.Module, channels: int, block: MakeBlock, *, attend_every: bool = True
) -> tuple[nn.ModuleDict, nn.ModuleDict]:
    """Encoder and decoder.

    Args:
        first: the convolution at full resolution; channels: what it returns.
        block: makes a block.
        attend_every: attention in every block of the decoder at the resolutions that have it, or
            in the last alone.
    """
    levels = list(zip(arguments.resolutions, arguments.channels, strict=True))
    enc, dec, skips = nn.ModuleDict(), nn.ModuleDict(), []
    for level, (r, wide) in enumerate(levels):
        if level == 0:
            enc[f"{r}x{r}_conv"] = first
        else:
            enc[f"{r}x{r}_down"] = block(channels, channels, decoder=False, resample="down")
        skips.append(channels)
        for i in range(arguments.num_blocks):
            attention = r in arguments.attn_resolutions
            enc[f"{r}x{r}_block{i}"] = block(channels, wide, decoder=False, attention=attention)
            channels = wide
            skips.append(channels)
    for level, (r, wide) in reversed(list(enumerate(levels))):
        if level == len(levels) - 1:
            dec[f"{r}x{r}_in0"] = block(channels, channels, decoder=True, attention=True)
            dec[f"{r}x{r}_in1"] = block(channels, channels, decoder=True)
        else:
            dec[f"{r}x{r}_up"] = block(channels, channels, decoder=True, resample="up")
        for i in range(arguments.num_blocks + 1):
            attention = r in arguments.attn_resolutions and (attend_every or i == arguments.num_blocks)
            dec[f"{r}x{r}_block{i}"] = block(channels + skips.pop(), wide, decoder=True, attention=attention)
            channels = wide
    return enc, dec


def run(
    enc: nn.ModuleDict,
    dec: nn.ModuleDict,
    x: Tensor,
    embedded: Tensor,
    join: Callable[[Tensor, Tensor], Tensor] = lambda h, skip: torch.cat([h, skip], dim=1),
) -> Tensor:
    """What the decoder returns (B, channels, H, W) for x (B, in_channels, H, W) and the embedding (B, width).

    Args:
        join: of the decoder's features and those that skip the coarser levels, on the channels.
    """
    h, skips = x, []
    for name, layer in enc.items():
        h = layer(h) if name.endswith("_conv") else layer(h, embedded)
        skips.append(h)
    for name, layer in dec.items():
        h = layer(join(h, skips.pop()) if "_block" in name else h, embedded)
    return h
