"""Inception score, from the class probabilities of a detector."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from emd_fast import distributed


class InceptionScore:
    """Inception score exp(E_x KL(p(class | x) || p(class))), over several splits of the samples.

    It keeps sums only, so that samples can come in batches, on one rank or many.

    Args:
        n: number of samples over all ranks.
        splits: number of splits, each of which gets a score; 10 is usual.

    Raises:
        ValueError: fewer samples than splits.

    Source: Salimans et al. (arXiv 1606.03498).
    """

    def __init__(self, n: int, splits: int = 10) -> None:
        if not 1 <= splits <= n:
            raise ValueError(f"the inception score needs at least {splits} samples, one in each part, got {n}")
        self._bounds = torch.tensor([i * n // splits for i in range(splits + 1)])
        self._sums = torch.zeros(0)

    def add(self, probabilities: Tensor, first: int) -> None:
        """Adds class probabilities (n, classes) of the samples that start at global index `first`."""
        p = probabilities.double()
        if not len(self._sums):
            self._sums = p.new_zeros(len(self._bounds) - 1, p.shape[1] + 1)
        index = torch.arange(first, first + len(p))
        part = (torch.searchsorted(self._bounds, index, right=True) - 1).to(p.device)
        self._sums.index_add_(0, part, torch.cat([p, torch.xlogy(p, p).sum(1, keepdim=True)], 1))

    def value(self, *, whole: bool = False) -> tuple[float, float]:
        """Returns mean and standard deviation of the score over the splits.

        All ranks call it once, after each has added at least one batch.

        Args:
            whole: this rank has added all samples. It then needs no other rank.
        """
        if distributed.world_size() > 1 and not whole:
            dist.all_reduce(self._sums)
        means = self._sums / self._bounds.diff().to(self._sums)[:, None]
        entropy = torch.xlogy(means[:, :-1], means[:, :-1]).sum(1)
        scores = (means[:, -1] - entropy).exp()
        return scores.mean().item(), scores.std(correction=0).item()
