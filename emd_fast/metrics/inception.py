"""Inception score: what the classes that a detector sees say about images."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from emd_fast import distributed


class InceptionScore:
    """exp of the mean divergence of the classes of an image from those of all, over parts of the samples.

    Only sums are kept, so that samples come in batches, on one rank or many.

    Args:
        n: samples in all. splits: parts, each with a score of its own; the usual 10.

    Raises:
        ValueError: fewer samples than parts.

    Source: Salimans et al. (arXiv 1606.03498).
    """

    def __init__(self, n: int, splits: int = 10) -> None:
        if not 1 <= splits <= n:
            raise ValueError(f"the inception score needs at least {splits} samples, one in each part, got {n}")
        self._bounds = torch.tensor([i * n // splits for i in range(splits + 1)])
        self._sums = torch.zeros(0)

    def add(self, probabilities: Tensor, first: int) -> None:
        """Probabilities (n, classes) of the samples from the global index `first` on."""
        p = probabilities.double()
        if not len(self._sums):
            self._sums = p.new_zeros(len(self._bounds) - 1, p.shape[1] + 1)
        index = torch.arange(first, first + len(p))
        part = (torch.searchsorted(self._bounds, index, right=True) - 1).to(p.device)
        self._sums.index_add_(0, part, torch.cat([p, torch.xlogy(p, p).sum(1, keepdim=True)], 1))

    def value(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts; all ranks call it, and each has added something."""
        if distributed.world_size() > 1:
            dist.all_reduce(self._sums)
        means = self._sums / self._bounds.diff().to(self._sums)[:, None]
        entropy = torch.xlogy(means[:, :-1], means[:, :-1]).sum(1)
        scores = (means[:, -1] - entropy).exp()
        return scores.mean().item(), scores.std(correction=0).item()
