"""The unconditional condition of guidance, for a batch of conditions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emd_fast.diffusion import ragged


def null_like(null_cond: Any, cond: Any, batch: int) -> Any:
    """Expands null_cond to a batch, with the structure, dtypes and devices of cond.

    Raises:
        ValueError: cond or null_cond is None, or they have different structures or shapes.
    """
    if cond is None:
        raise ValueError("guidance needs a condition: give cond, or leave guidance None")
    if null_cond is None:
        raise ValueError("guidance needs a null condition: give null_cond, here or to the Denoiser")
    if isinstance(null_cond, int) and isinstance(cond, Tensor):
        return torch.full_like(cond, null_cond)
    if isinstance(cond, dict) and isinstance(null_cond, dict) and cond.keys() == null_cond.keys():
        null_cond = {name: null_cond[name] for name in cond}  # in one order
    leaves, structure = pytree.tree_flatten(cond)
    null_leaves, null_structure = pytree.tree_flatten(null_cond)
    if structure != null_structure:
        raise ValueError(f"null_cond must have the structure of cond, {structure}, got {null_structure}")
    masks = ragged.mask_of(cond), ragged.mask_of(null_cond)
    tokens, null_tokens = (-1 if mask is None else mask.shape[1] for mask in masks)
    for null, leaf in zip(null_leaves, leaves, strict=True):
        # Another number of tokens is padded.
        longer = ragged.has_tokens(leaf, tokens) and ragged.has_tokens(null, null_tokens)
        if null.shape[1 + longer :] != leaf.shape[1 + longer :]:
            raise ValueError(f"null_cond must have the shape of cond, {tuple(leaf.shape)}, got {tuple(null.shape)}")
    matched = [null.to(leaf).expand(batch, *null.shape[1:]) for null, leaf in zip(null_leaves, leaves, strict=True)]
    return pytree.tree_unflatten(matched, structure)
