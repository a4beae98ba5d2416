from __future__ import annotations

import math

import torch
from torch import Tensor

from emd_fast import backends
from emd_fast.ops import _check

BACKENDS = ("triton", "sdpa", "xformers", "reference")
_MAX_HEAD_DIM = 256


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """softmax(scale q k^T) v. Differentiable.

    Args:
        q: (B, tokens, heads, head_dim) float32, bfloat16 or float16, unit stride in head_dim, head_dim up to 256.
        k, v: (B, keys, heads, head_dim), dtype of q; keys may be fewer or more than tokens.
        scale: 1 / sqrt(head_dim) when None.
        backend: "sdpa" (torch.nn.functional.scaled_dot_product_attention), "reference" (float32 arithmetic), "triton"
            or "xformers"; None takes "sdpa", or what use_backend names.

    Returns:
        (B, tokens, heads, head_dim), dtype of q.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an unknown backend.
        RuntimeError: a backend that cannot run here.

    Source: Vaswani et al. (arXiv 1706.03762).
    """
    _check.tensor("q", q)
    if q.dim() != 4 or q.shape[3] > _MAX_HEAD_DIM:
        raise ValueError(f"q must have shape (B, tokens, heads, head_dim), head_dim <= 256, got {tuple(q.shape)}")
    _check.tensor("k", k)
    if k.dim() != 4:
        raise ValueError(f"k must have shape (B, keys, heads, head_dim), got {tuple(k.shape)}")
    for name, value in (("k", k), ("v", v)):
        _check.tensor(name, value, shape=(q.shape[0], k.shape[1], *q.shape[2:]), like=q)
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {value.dtype}")
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.shape[3] > 1 and value.stride(3) != 1:
            raise ValueError(f"{name} must have unit stride in head_dim, got strides {tuple(value.stride())}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("triton", "xformers"):
        raise RuntimeError(f"backend {backend!r} cannot run attention: this version has no {backend} attention")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    active = backends.active()
    if backend is None and active not in ("auto", "reference"):
        reason = backends.why_not("attention", active, q.device.type)
        raise RuntimeError(f"backend {active!r} cannot run attention on {q.device.type} tensors: {reason}")
    if scale is None:
        scale = 1 / math.sqrt(max(q.shape[3], 1))
    if backend == "reference" or (backend is None and active == "reference"):
        return _reference(q, k, v, scale)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float())
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v.float()).to(q.dtype)
