"""The blocks of EDM's networks (SongUNet, DhariwalUNet), known by their structure.

Source: Karras et al. (arXiv 2206.00364), appendix F; Dhariwal and Nichol (arXiv 2105.05233).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from emd_fast.cache.conditioning import remember
from emd_fast.cache.weights import autocast_dtype
from emd_fast.fusion.attention import attention, check_head_dim
from emd_fast.fusion.compiled_blocks import run
from emd_fast.fusion.convolution import convolution
from emd_fast.fusion.fused_class import Fused, has, is_a
from emd_fast.fusion.layers import Convolution, Rounded
from emd_fast.fusion.norm import Norm, channels_of
from emd_fast.fusion.qkv_order import Packed, PackedConvolution, can_pack, packed


class Block(Fused):
    """conv1(silu(norm1 with the embedding(conv0(silu(norm0(x)))))) + skip(x), then attention over pixels, if any."""

    does = "norms, embedding and SiLUs by two kernels, attention by ops.attention"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        names = ("norm0", "conv0", "affine", "norm1", "conv1", "skip", "adaptive_scale", "skip_scale", "num_heads")
        return has(module, *names) and "forward" not in vars(module)

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        names = ("norm0", "norm1", *(("norm2",) if module.num_heads else ()))
        unknown = [name for name in names if not Norm.recognises(getattr(module, name))]
        return f"{', '.join(unknown)}: not a GroupNorm" if unknown else None

    @classmethod
    def check(cls, module: Any) -> None:
        if module.num_heads and cls.why_not(module) is None:
            check_head_dim(channels_of(module.norm2) // module.num_heads)

    @classmethod
    def probe(cls, module: Any) -> tuple[tuple[int, ...], ...] | None:
        return (2, channels_of(module.norm0), 4, 4), (2, module.affine.weight.shape[1])

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        embedded = remember(self.affine, self.affine, emb)
        return run(self, _block, x, embedded)


def _block(block: Any, x: Tensor, embedded: Tensor) -> Tensor:
    h = block.conv0(block.norm0(x, activation="silu"))
    if block.adaptive_scale:
        scale, shift = embedded.chunk(2, dim=1)
        h = block.norm1(h, scale=scale, shift=shift, activation="silu")
    else:
        h = block.norm1(h, add=embedded, activation="silu")
    h = block.conv1(dropout(h, p=block.dropout, training=block.training))
    x = (h + (x if block.skip is None else block.skip(x))) * block.skip_scale
    if not block.num_heads:
        return x
    q, k, v = _projected(block, block.norm2(x))
    mixed = attention(q, k, v)
    return (block.proj(as_image(mixed, x)) + x) * block.skip_scale


def _projected(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, (B, tokens, heads, head_dim) each."""
    if not can_pack(block.qkv):
        return tuple(part.contiguous() for part in queries_keys_values(block.qkv(x), block.num_heads))
    dtype = autocast_dtype(x.device.type) or x.dtype
    weight, bias = (None if rows is None else rows.to(dtype) for rows in packed(block.qkv))
    tokens = linear(x.flatten(2).transpose(1, 2), weight, bias)  # type: ignore[arg-type]
    return tokens.unflatten(2, (3, block.num_heads, -1)).unbind(2)


class OwnBlock(Fused):
    """The block of emd_fast.teachers' SongUNet and DhariwalUNet, which calls the ops of this library itself."""

    does = "scales and shifts computed once inside conditioning_cache"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_a(module, "Block") and has(module, "norm0", "conv0", "affine", "norm1", "conv1", "modulated")

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return run(self, self._emd_fast_base.modulated, x, remember(self.affine, self.affine, embedded))

    def _packed(self) -> tuple[Tensor, Tensor | None]:
        own: tuple[Tensor, Tensor | None] = packed(self.qkv) if isinstance(self.qkv, Packed) else super()._packed()  # type: ignore[misc]
        return own


class Linear(Rounded):
    """x weight^T + bias."""

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return _weight_of(module, dim=2) and not any(True for _ in module.children())

    @classmethod
    def probe(cls, module: Any) -> tuple[tuple[int, ...], ...] | None:
        return ((2, module.weight.shape[1]),)


class OwnResampled(Rounded):
    """A convolution of emd_fast.teachers that changes the resolution."""

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_a(module, "ResampledConv") and "weight" in module._parameters


class Conv(Rounded):
    """A convolution, with a filter that changes the resolution before or after it where up or down says so."""

    spares = Convolution.spares

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return _weight_of(module, dim=4) and has(module, "up", "down")

    @classmethod
    def probe(cls, module: Any) -> tuple[tuple[int, ...], ...] | None:
        return ((2, module.weight.shape[1], 4, 4),)

    def forward(self, x: Tensor) -> Tensor:
        if self.up or self.down:
            resampled: Tensor = super().forward(x)
            return resampled
        dtype = autocast_dtype(x.device.type) or x.dtype
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        height, width = weight.shape[2:]
        return convolution(x, weight, bias, padding=(height // 2, width // 2))


class PackedConv(Packed, Conv):
    """One of 1x1 to q, k and v."""


_PACKED: dict[type[Fused], type[Fused]] = {Convolution: PackedConvolution, Conv: PackedConv}


def packed_kind(block: Any, kind: type[Fused]) -> type[Fused] | None:
    """Of which its projection to q, k and v is, instead of this one; None where it is no such layer."""
    return _PACKED.get(kind) if block.qkv.weight.shape[2:] == (1, 1) else None


def _weight_of(module: Any, dim: int) -> bool:
    parameters = module._parameters
    return (
        not isinstance(module, (nn.Linear, nn.Conv2d))
        and "forward" not in vars(module)
        and isinstance(parameters.get("weight"), Tensor)
        and parameters["weight"].dim() == dim
        and parameters.keys() == {"weight", "bias"}
    )


def queries_keys_values(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """(B, tokens, heads, head_dim) each, strided, of (B, heads head_dim 3, H, W), the channels in that order."""
    return qkv.flatten(2).unflatten(1, (heads, -1, 3)).permute(3, 0, 4, 1, 2).unbind(0)


def as_image(mixed: Tensor, like: Tensor) -> Tensor:
    """(B, tokens, heads, head_dim) as (B, C, H, W)."""
    return mixed.flatten(2).transpose(1, 2).unflatten(2, like.shape[2:])
