from __future__ import annotations

import math

import torch
from torch import Tensor

from emd_fast.backends.reference.common import wide

_LOG2_E = math.log2(math.e)


def _logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return scale * torch.einsum("bqhd,bkhd->bhqk", wide(q), wide(k))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The result, and the logarithm to base 2 of the sum of the exponentials (B, heads, tokens)."""
    logits = _logits(q, k, scale)
    out = torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), wide(v)).to(q.dtype)
    return out.contiguous(), _LOG2_E * logits.logsumexp(-1)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to q, k and v that are asked for, contiguous; an empty tensor in place of each other one."""
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
