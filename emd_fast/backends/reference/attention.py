from __future__ import annotations

import math

import torch
from torch import Tensor

from emd_fast.backends.reference.common import wide

_LOG2_E = math.log2(math.e)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("bqhd,bkhd->bhqk", wide(q), wide(k))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Attention, with two numbers per query for the backward pass.

    Returns:
        out; top (B, heads, tokens) float32, the largest logit in base 2; share (B, heads, tokens)
        float32, the weight of that logit. Each weight is share * 2^(logit - top).
    """
    logits = _logits(q, k, scale)
    weights = logits.softmax(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, wide(v)).to(q.dtype).contiguous()
    if not k.shape[1]:
        return out, logits.new_full(logits.shape[:3], -math.inf), logits.new_zeros(logits.shape[:3])
    return out, _LOG2_E * logits.amax(-1), weights.amax(-1)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    top: Tensor,
    share: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous gradients of q, k and v. A gradient that `needs` excludes is an empty tensor."""
    weights = _logits(q, k, scale).softmax(-1)
    grad = wide(grad)

    def grad_logits() -> Tensor:
        to_weights = torch.einsum("bqhd,bkhd->bhqk", grad, wide(v))
        return scale * weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True))

    to_logits = grad_logits() if needs[0] or needs[1] else weights
    gradients = (
        lambda: torch.einsum("bhqk,bkhd->bqhd", to_logits, wide(k)),
        lambda: torch.einsum("bhqk,bqhd->bkhd", to_logits, wide(q)),
        lambda: torch.einsum("bhqk,bqhd->bkhd", weights, grad),
    )
    of_q, of_k, of_v = (
        gradient().to(q.dtype).contiguous() if need else q.new_empty(0)
        for gradient, need in zip(gradients, needs, strict=True)
    )
    return of_q, of_k, of_v
