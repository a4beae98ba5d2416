"""Attention as the fused blocks call it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from emd_fast import backends, ops
from emd_fast.fusion.norm import SERVED

MAX_HEAD_DIM = 256


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """ops.attention, (B, tokens, heads, head_dim); PyTorch's own for a dtype or a backend that has none."""
    if q.dtype not in SERVED:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    # These two have kernels of ours for norms, and leave attention to PyTorch.
    return ops.attention(q, k, v, scale=scale, backend="sdpa" if backends.active() in ("cpu", "cuda") else None)


def check_head_dim(head_dim: int) -> None:
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"attention has a head_dim of {head_dim}, and ops.attention takes at most {MAX_HEAD_DIM}")
