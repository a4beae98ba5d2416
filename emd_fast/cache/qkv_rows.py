"""The order of the rows in a projection to queries, keys and values."""

from __future__ import annotations

from torch import Tensor


def by_part(rows: Tensor, heads: int) -> Tensor:
    """A weight (3C, C, 1, 1) or bias (3C,) of q, k and v, (3C, C) or (3C,) in another order.

    In the checkpoints of EDM and EDM2 row (head * C / heads + channel) * 3 + (0 q, 1 k, 2 v); here
    q, k, v, head, channel. What comes of it is then split by a view, of unit stride in the
    channels of a head: the weight is reordered, which is small, and not the activations.
    """
    rows = rows.flatten(1) if rows.dim() > 1 else rows
    return rows.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
