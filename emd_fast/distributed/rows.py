"""Rows of a tensor that a rank holds, and the choice of the rank that writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a tensor (entries of dimension 0) that this rank holds.

    A scalar has one row.

    Args:
        shape: shape of the whole tensor.
        first: index of the first row.
        values: the rows (n, *shape[1:]), or (1,) for a scalar. They share the tensor's memory.
        copy: index among the equal copies of a DTensor's shard. None for a plain tensor, which
            every rank holds.
    """

    shape: tuple[int, ...]
    first: int
    values: Tensor
    copy: int | None


def held(tensor: Tensor) -> Rows:
    """Returns the rows of a tensor that this rank holds.

    Raises:
        ValueError: a DTensor that is neither replicated nor sharded once, on dimension 0.
    """
    own: Any = tensor.detach()
    shape, first, copy = tuple(own.shape), 0, None
    if hasattr(own, "to_local"):
        sharded = [axis for axis, placement in enumerate(own.placements) if placement.is_shard()]
        if len(sharded) > 1 or not all(p.is_replicate() or p.is_shard(0) for p in own.placements):
            raise ValueError(f"a tensor must be replicated, or sharded on dimension 0, got {own.placements}")
        place = own.device_mesh.get_coordinate()
        copy = sum(index for axis, index in enumerate(place) if axis not in sharded)
        if sharded:
            each = math.ceil(shape[0] / own.device_mesh.size(sharded[0]))  # the rule of torch.chunk
            first = min(place[sharded[0]] * each, shape[0])
        own = own.to_local()
    return Rows(shape, first, own if shape else own.unsqueeze(0), copy)


def to_write(tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Rows]:
    """Selects the rows of each tensor that `rank` writes.

    All ranks together write every row once.

    Args:
        tensors: the same names in the same order on every rank.

    Returns:
        name -> rows. n is 0 if other ranks write all rows of the tensor.
    """
    result, load = {}, [0] * world
    for name, tensor in tensors.items():
        rows = held(tensor)
        if rows.copy is None:  # written by the rank with the least to write so far
            writer = load.index(min(load))
            load[writer] += rows.values.nbytes
            mine = writer == rank
        else:
            mine = rows.copy == 0
        result[name] = rows if mine else replace(rows, values=rows.values[:0])
    return result
