"""The blocks of EDM's networks (SongUNet, DhariwalUNet) as NVlabs publishes them.

Source: Karras et al. (arXiv 2206.00364), appendix F; Dhariwal and Nichol (arXiv 2105.05233).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import dropout, linear

from emd_fast.cache.conditioning import remember
from emd_fast.cache.layers import QKVWeight, can_pack, cast_parameter
from emd_fast.cache.weights import autocast_dtype
from emd_fast.fusion.compiled_blocks import run
from emd_fast.fusion.fused_class import STATE, Fused, check_head_dim, has, named
from emd_fast.fusion.layers import Convolution, Rounded
from emd_fast.fusion.norm import Norm, channels_of
from emd_fast.fusion.published import is_published, unpublished
from emd_fast.ops.biases import convolved, convolved_and_added, remember_added, without_bias
from emd_fast.ops.convolution import convolution
from emd_fast.ops.layers import attention, residual


class Block(Fused):
    """The residual block of EDM: norm, SiLU and convolution twice, a skip, optional attention."""

    does = "norms, embedding and SiLUs by two kernels, attention by ops.attention"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return named(module, "UNetBlock") is not None and has(module, "norm0", "conv0", "affine", "norm1", "num_heads")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if why := unpublished(module, "UNetBlock"):
            return why
        names = ("norm0", "norm1", *(("norm2",) if module.num_heads else ()))
        unknown = [name for name in names if not Norm.serves(getattr(module, name))]
        return f"{', '.join(unknown)}: not a GroupNorm that is known" if unknown else None

    @classmethod
    def check(cls, module: Any) -> None:
        if module.num_heads and cls.why_not(module) is None:
            check_head_dim(channels_of(module.norm2) // module.num_heads)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        affine: Any = self.affine
        if self.adaptive_scale:
            return run(self, _block, x, remember(affine, affine, emb))
        return run(self, _block, x, remember_added(affine, self.conv0, affine, emb))


def _block(block: Any, x: Tensor, embedded: Tensor) -> Tensor:
    h = block.norm0(x, activation="silu")
    if block.adaptive_scale:
        scale, shift = embedded.chunk(2, dim=1)
        h, add = convolved_and_added(block.conv0, h)
        h = block.norm1(h, add=add, scale=scale, shift=shift, activation="silu")
    else:
        h = block.norm1(without_bias(block.conv0, h), add=embedded, activation="silu")
    h, bias = convolved(block.conv1, dropout(h, p=block.dropout, training=block.training))
    x, skip_bias = (x, None) if block.skip is None else convolved(block.skip, x)
    x = residual(h, x, bias, skip_bias, block.skip_scale)
    if not block.num_heads:
        return x
    q, k, v = _projected(block, block.norm2(x))
    mixed = attention(q, k, v)
    y, bias = convolved(block.proj, as_image(mixed, x))
    return residual(y, x, bias, None, block.skip_scale)


def _projected(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    """q, k and v, (B, tokens, heads, head_dim) each."""
    if not can_pack(block.qkv):
        return tuple(part.contiguous() for part in queries_keys_values(block.qkv(x), block.num_heads))
    dtype = autocast_dtype(x.device.type) or x.dtype
    weight, bias = (None if rows is None else rows.to(dtype) for rows in map(block.qkv.packed, ("weight", "bias")))
    tokens = linear(x.flatten(2).transpose(1, 2), weight, bias)  # type: ignore[arg-type]
    return tokens.unflatten(2, (3, block.num_heads, -1)).unbind(2)


class Linear(Rounded):
    """x weight^T + bias."""

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_published(module, "Linear") and _weight_of(module, dim=2)


class Conv(Rounded):
    """A convolution, with resampling before or after it if `up` or `down` is set."""

    spares = Convolution.spares
    rounds = ("weight", "bias")
    bias = cast_parameter("bias")

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_published(module, "Conv2d") and _weight_of(module, dim=4)

    def forward(self, x: Tensor) -> Tensor:
        if self.adds_bias():
            resampled: Tensor = super().forward(x)
            return resampled
        return self._convolved(x, self.bias)

    def adds_bias(self) -> bool:
        """Whether the bias must be added inside: see emd_fast.ops.biases."""
        return bool(self.up or self.down)

    def without_bias(self, x: Tensor) -> Tensor:
        """As the module itself, without the bias."""
        return self._convolved(x, None)

    def _convolved(self, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = autocast_dtype(x.device.type) or x.dtype
        weight, bias = self.weight.to(dtype), None if bias is None else bias.to(dtype)
        height, width = weight.shape[2:]
        return convolution(x, weight, bias, padding=(height // 2, width // 2))


class Packed(QKVWeight, Rounded):
    """A projection to q, k and v. Its state has the number of heads."""

    prepares = "rows put into the order of q, k, v and rounded once per E-step"

    @property
    def heads(self) -> int:  # type: ignore[override]
        count: int = self.__dict__[STATE]["heads"]
        return count


class PackedConvolution(Packed, Convolution):
    """A projection to q, k and v that is a Conv2d of PyTorch."""


class PackedConv(Packed, Conv):
    """A projection to q, k and v that is a Conv2d of EDM."""


_PACKED: dict[type[Fused], type[Fused]] = {Convolution: PackedConvolution, Conv: PackedConv}


def packed_kind(block: Any, kind: type[Fused]) -> type[Fused] | None:
    """The kind for a block's projection to q, k and v, None if that is no 1x1 convolution."""
    return _PACKED.get(kind) if block.qkv.weight.shape[2:] == (1, 1) else None


def _weight_of(module: Any, dim: int) -> bool:
    parameters = module._parameters
    weight = parameters.get("weight")
    return parameters.keys() == {"weight", "bias"} and isinstance(weight, Tensor) and weight.dim() == dim


def queries_keys_values(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Splits (B, heads head_dim 3, H, W) into three strided views (B, tokens, heads, head_dim)."""
    return qkv.flatten(2).unflatten(1, (heads, -1, 3)).permute(3, 0, 4, 1, 2).unbind(0)


def as_image(mixed: Tensor, like: Tensor) -> Tensor:
    """(B, tokens, heads, head_dim) as (B, C, H, W)."""
    return mixed.flatten(2).transpose(1, 2).unflatten(2, like.shape[2:])
