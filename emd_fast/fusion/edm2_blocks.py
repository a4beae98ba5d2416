"""The magnitude-preserving blocks of EDM2's networks, as NVlabs publishes them.

Source: Karras et al. (arXiv 2312.02696), section 2 and appendix B.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, dropout, interpolate, linear, silu

from emd_fast.cache.conditioning import remember
from emd_fast.cache.weights import autocast_dtype, is_plain
from emd_fast.fusion.compiled_blocks import run
from emd_fast.fusion.edm_blocks import as_image, queries_keys_values
from emd_fast.fusion.fused_class import Fused, check_head_dim, has, named
from emd_fast.fusion.layers import Convolution, Rounded
from emd_fast.fusion.published import is_published, unpublished
from emd_fast.ops.convolution import convolution
from emd_fast.ops.layers import attention

_SILU_RMS = 0.596  # of silu(x) for x ~ N(0, 1)
_EPS = 1e-4
_RESAMPLE = {
    "keep": lambda x: x,
    "down": lambda x: avg_pool2d(x, 2),
    "up": lambda x: interpolate(x, scale_factor=2.0, mode="nearest"),
}


class MPConv(Rounded):
    """A convolution or linear layer with normalised weights."""

    prepares = "weight normalised and rounded once per E-step"
    spares = Convolution.spares

    @classmethod
    def recognises(cls, module: Any) -> bool:
        weight = module._parameters.get("weight")
        return (
            isinstance(weight, Tensor)
            and weight.dim() in (2, 4)
            and module._parameters.keys() == {"weight"}
            and is_published(module, "MPConv")
        )

    def prepare(self) -> dict[str, Tensor]:
        parameter = self._parameters["weight"]
        if not is_plain(parameter):
            return {}
        weight = _normalised(parameter.detach(), 1)
        return {"normalised": weight.to(autocast_dtype(weight.device.type) or weight.dtype)}

    def in_use(self, dtype: torch.dtype, gain: float | Tensor = 1) -> Tensor:
        """The weight as products of this dtype take it."""
        own = self._parameters["weight"]
        dtype = autocast_dtype(own.device.type) or dtype
        prepared = self._emd_fast_weight_cache
        weight = None if prepared is None else prepared.get("normalised")
        wanted = torch.is_grad_enabled() and own.requires_grad
        if weight is None or wanted or isinstance(gain, Tensor) or gain != 1 or weight.dtype not in (dtype, own.dtype):
            if self.training:  # the parameter itself, which keeps its learning rate from falling as it grows
                with torch.no_grad():
                    own.copy_(_of_unit_magnitude(own.float(), dim=list(range(1, own.dim()))))
            weight = _normalised(own, gain)
        return weight.to(dtype)

    def forward(self, x: Tensor, gain: float | Tensor = 1) -> Tensor:
        weight = self.in_use(x.dtype, gain)
        if weight.dim() == 2:
            return linear(x, weight)
        return convolution(x, weight, padding=(weight.shape[2] // 2, weight.shape[3] // 2))


def _normalised(weight: Tensor, gain: float | Tensor) -> Tensor:
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    unit = _of_unit_magnitude(weight, dim=list(range(1, weight.dim())))
    return unit * (gain / math.sqrt(weight[0].numel()))


class Block(Fused):
    """A residual branch with a gain from the embedding, then optional cosine attention."""

    does = "attention by ops.attention, gains computed once inside conditioning_cache"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return named(module, "Block") is not None and has(module, "conv_res0", "emb_linear", "flavor", "resample_mode")

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if why := unpublished(module, "Block"):
            return why
        if module.flavor not in ("enc", "dec") or module.resample_mode not in _RESAMPLE:
            return f"flavor {module.flavor!r}, resample_mode {module.resample_mode!r}"
        taps = module.resample_filter
        if module.resample_mode != "keep":
            taps = torch.as_tensor(taps).flatten().tolist()
            if len(taps) not in (2, 4) or any(tap != taps[0] for tap in taps):
                return f"its resampling filter is {taps}, not a box of two pixels"
        return None

    @classmethod
    def check(cls, module: Any) -> None:
        if module.num_heads and hasattr(module.attn_proj, "weight"):
            check_head_dim(module.attn_proj.weight.shape[1] // module.num_heads)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        linear: Any = self.emb_linear
        gain = remember(linear, linear, emb, gain=self.emb_gain)
        return run(self, _block, x, gain)


def _block(block: Any, x: Tensor, gain: Tensor) -> Tensor:
    x = _RESAMPLE[block.resample_mode](x)
    if block.flavor == "enc":
        x = _of_unit_magnitude(x if block.conv_skip is None else block.conv_skip(x), dim=1)
    h = block.conv_res0(_silu(x))
    h = _silu(h * (gain + 1)[:, :, None, None].to(h.dtype))
    if block.training and block.dropout:
        h = dropout(h, p=block.dropout)
    h = block.conv_res1(h)
    if block.flavor == "dec" and block.conv_skip is not None:
        x = block.conv_skip(x)
    x = _mixed(x, h, block.res_balance)
    if block.num_heads:
        parts = queries_keys_values(block.attn_qkv(x), block.num_heads)
        q, k, v = (_of_unit_magnitude(part, dim=3).contiguous() for part in parts)
        x = _mixed(x, block.attn_proj(as_image(attention(q, k, v), x)), block.attn_balance)
    return x if block.clip_act is None else x.clip(-block.clip_act, block.clip_act)


def _silu(x: Tensor) -> Tensor:
    return silu(x) / _SILU_RMS


def _mixed(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of the magnitude of uncorrelated a and b."""
    return a.lerp(b, t) / math.hypot(1 - t, t)


def _of_unit_magnitude(x: Tensor, dim: int | list[int]) -> Tensor:
    """x over its root mean square along dim."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (_EPS + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)
