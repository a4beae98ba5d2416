"""Gradient clipping of one network, and the number of updates whose gradient was clipped."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Clipping:
    """Clips the gradient of a network to a largest norm. Counts the clipped updates on the device.

    A gradient that is not finite does not count as clipped: its update is skipped.

    Args:
        limit: largest norm of the whole gradient; 0 for no clipping.
        device: of the count.

    Attributes:
        updates: number of updates so far, skipped ones included.
        clipped: device scalar int64, the number of them whose gradient was clipped.
    """

    def __init__(self, limit: float, device: torch.device) -> None:
        self._limit = limit
        self.updates, self.clipped = 0, torch.zeros((), dtype=torch.int64, device=device)

    def clip(self, parameters: Sequence[nn.Parameter], norm: Tensor) -> None:
        """Clips the gradients of `parameters` in place. The host does not wait.

        Args:
            norm: scalar, the norm of the whole gradient over all ranks, on the device of the gradients.
        """
        self.updates += 1
        if not self._limit:
            return
        nn.utils.clip_grads_with_norm_(parameters, self._limit, norm)
        clipped = torch.isfinite(norm) & (norm > self._limit)
        self.clipped += clipped.to(self.clipped.device, non_blocking=True)

    def share(self) -> Tensor:
        """Share of the updates so far whose gradient was clipped: a device scalar, 0 without updates."""
        return self.clipped / max(self.updates, 1)

    def counts(self) -> list[int]:
        """The numbers of clipped updates and of updates, for a checkpoint. Waits for the device."""
        return [int(self.clipped), self.updates]

    def restore(self, clipped: int, updates: int) -> None:
        """Continues from the numbers that `counts` returned."""
        self.clipped.fill_(clipped)
        self.updates = updates
