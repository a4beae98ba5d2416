"""The ops as layers of networks call them.

The kernels take float32, bfloat16 and float16 and heads of at most 256 dimensions. PyTorch computes
everything else. In compiled code it also computes what the compiler fuses by itself: the end of a
residual block, and GEGLU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

from emd_fast import backends, ops

SERVED = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """ops.attention, or PyTorch's attention where the op has no kernel.

    Args:
        q, k, v: (B, tokens, heads, head_dim).
        scale: 1 / sqrt(head_dim) when None.
    """
    if q.dtype not in SERVED or q.shape[-1] > MAX_HEAD_DIM:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    # The backends "cpu" and "cuda" have kernels for norms but none for attention.
    return ops.attention(q, k, v, scale=scale, backend="sdpa" if backends.active() in ("cpu", "cuda") else None)


def _left_to_pytorch(*tensors: Tensor) -> bool:
    """Whether an op without a compiled kernel, which the compiler fuses by itself, is left to PyTorch."""
    other = any(tensor.dtype not in SERVED for tensor in tensors)
    return other or torch.compiler.is_compiling() or backends.active() in ("cpu", "cuda")


def residual(
    x: Tensor, skip: Tensor, bias: Tensor | None = None, skip_bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """ops.residual, or PyTorch's additions where they are all that is asked for, or where it has no kernel."""
    biases = [bias for bias in (bias, skip_bias) if bias is not None]
    if (biases or scale != 1) and not _left_to_pytorch(x, skip):
        return ops.residual(x, skip, bias, skip_bias, scale=scale)
    total = x + skip
    for values in biases:
        total = total + values.to(total.dtype).reshape(-1, *[1] * (x.dim() - 2))
    return total if scale == 1 else total * scale


def geglu(packed: Tensor) -> Tensor:
    """ops.geglu, or PyTorch's operations where it has no kernel."""
    if not _left_to_pytorch(packed):
        return ops.geglu(packed)
    values, gates = packed.chunk(2, dim=-1)
    return values * gelu(gates)


def group_norm(
    layer: Any,
    x: Tensor,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(norm(x + add) (1 + scale) + shift), with the groups, eps, weight and bias of a layer.

    Args:
        layer: has num_groups, eps, weight (C,) or None, bias (C,) or None.
        x: (B, C, ...). add, scale, shift: (B, C) or (1, C). activation: None or "silu".
    """
    groups, eps, weight, bias = layer.num_groups, layer.eps, layer.weight, layer.bias
    if x.dtype in SERVED:
        add, scale, shift = (v if v is None or len(v) == len(x) else v.expand(len(x), -1) for v in (add, scale, shift))
        return ops.group_norm(
            x, groups, weight, bias, eps=eps, add=add, scale=scale, shift=shift, activation=activation
        )
    add, scale, shift = (v if v is None else v.reshape(*v.shape, *[1] * (x.dim() - 2)) for v in (add, scale, shift))
    weight, bias = (v if v is None else v.to(x.dtype) for v in (weight, bias))
    y = nn.functional.group_norm(x if add is None else x + add, groups, weight, bias, eps)
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return y if activation is None else silu(y)


class GroupNorm(nn.GroupNorm):
    """A GroupNorm served by the fused op, together with what surrounds it in a block."""

    def forward(
        self,
        input: Tensor,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """As `group_norm` of this module."""
        return group_norm(self, input, add, scale, shift, activation)
