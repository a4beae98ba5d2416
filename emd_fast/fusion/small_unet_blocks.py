"""The blocks of the project's own UNet (emd_fast.teachers.small_unet)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emd_fast.fusion.attention import attention, check_head_dim
from emd_fast.fusion.compiled_blocks import run
from emd_fast.fusion.fused_class import Fused, has, is_a
from emd_fast.fusion.norm import Norm, channels_of


class ResidualBlock(Fused):
    does = "norms, scale, shift and SiLUs by two kernels"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_a(module, "ResidualBlock") and has(module, "norm1", "conv1", "norm2", "conv2", "skip", "channels")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        norms = (module.norm1, module.norm2)
        return None if all(Norm.recognises(norm) for norm in norms) else "its norms are not GroupNorm"

    @classmethod
    def probe(cls, module: Any) -> tuple[tuple[int, ...], ...] | None:
        return (2, channels_of(module.norm1), 4, 4), (2, 2 * module.channels)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        return run(self, _residual_block, x, modulation)


def _residual_block(block: Any, x: Tensor, modulation: Tensor) -> Tensor:
    scale, shift = modulation.chunk(2, dim=1)
    h = block.conv1(block.norm1(x, activation="silu"))
    h = block.norm2(h, scale=scale, shift=shift, activation="silu")
    return block.skip(x) + block.conv2(h)


class SelfAttention(Fused):
    does = "attention by ops.attention"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_a(module, "SelfAttention") and has(module, "norm", "qkv", "projection")

    @classmethod
    def check(cls, module: Any) -> None:
        check_head_dim(module.projection.in_features)

    @classmethod
    def probe(cls, module: Any) -> tuple[tuple[int, ...], ...] | None:
        return ((2, module.projection.in_features, 4, 4),)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part[:, :, None] for part in self.qkv(tokens).chunk(3, dim=-1))
        mixed = attention(q, k, v)[:, :, 0]
        return x + self.projection(mixed).transpose(1, 2).reshape(x.shape)
