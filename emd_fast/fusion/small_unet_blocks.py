"""The blocks of `emd_fast.teachers.small_unet`, which computes in plain PyTorch until it is fused."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emd_fast.fusion.compiled_blocks import run
from emd_fast.fusion.fused_class import OVERRIDDEN, Fused, check_head_dim, is_a, named
from emd_fast.fusion.norm import Norm
from emd_fast.ops.layers import attention

_MODULE = "emd_fast.teachers.small_unet."


class ResidualBlock(Fused):
    does = "norms, scale, shift and SiLUs by two kernels"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return named(module, "ResidualBlock", _MODULE) is not None

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if not is_a(module, "ResidualBlock", _MODULE):
            return OVERRIDDEN
        return None if all(map(Norm.serves, (module.norm1, module.norm2))) else "its norms are not GroupNorm"

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
        return named(module, "SelfAttention", _MODULE) is not None

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return None if is_a(module, "SelfAttention", _MODULE) else OVERRIDDEN

    @classmethod
    def check(cls, module: Any) -> None:
        check_head_dim(module.projection.in_features)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = (part[:, :, None] for part in self.qkv(tokens).chunk(3, dim=-1))
        mixed = attention(q, k, v)[:, :, 0]
        return x + self.projection(mixed).transpose(1, 2).reshape(x.shape)
