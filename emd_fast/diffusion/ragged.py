"""Conditions of prompts with different numbers of tokens: a bool tensor (B, tokens) tells tokens from padding.

Tensors (B, tokens, ...) of the condition are cut and padded with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_STEP = 64  # numbers of tokens are multiples of it, so that batches have few shapes


def mask_of(cond: Any) -> Tensor | None:
    """The mask (B, tokens) of a condition, or None."""
    for leaf in pytree.tree_leaves(cond):
        if isinstance(leaf, Tensor) and leaf.dtype == torch.bool and leaf.dim() == 2:
            return leaf
    return None


def has_tokens(leaf: Tensor, tokens: int) -> bool:
    """Whether a tensor of a condition has a value for each token. Widths of pooled embeddings may be equal to it."""
    return leaf.shape[1:2] == (tokens,) and (leaf.dim() > 2 or leaf.dtype == torch.bool)


def kept(mask: Tensor) -> int:
    """Number of tokens of a batch that are kept: those of its longest prompt, to the next multiple of 64."""
    places = mask.any(0).nonzero()
    longest = int(places[-1]) + 1 if len(places) else 1
    return min(mask.shape[1], -(-longest // _STEP) * _STEP)


def trimmed(cond: Any) -> Any:
    """Cuts padding that no prompt of the batch needs. A condition without a mask on the CPU is returned as it is."""
    mask = mask_of(cond)
    if mask is None or mask.device.type != "cpu" or not mask.numel():
        return cond
    tokens, length = mask.shape[1], kept(mask)
    return pytree.tree_map(lambda leaf: leaf[:, :length] if has_tokens(leaf, tokens) else leaf, cond)


def padded(value: Tensor, tokens: int) -> Tensor:
    """Pads (B, n, ...) with zeros to (B, tokens, ...)."""
    missing = tokens - value.shape[1]
    return torch.cat([value, value.new_zeros(len(value), missing, *value.shape[2:])], 1) if missing > 0 else value


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Concatenates two batches; pads the one with fewer tokens."""
    if first.shape[1:] == second.shape[1:]:
        return torch.cat([first, second])
    longest = max(first.shape[1], second.shape[1])
    return torch.cat([padded(first, longest), padded(second, longest)])
