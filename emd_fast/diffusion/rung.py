"""Condition of a few-step generator: the rung of each sample, and its sample of the rung before."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class OnRung(NamedTuple):
    """Condition of B samples on the rungs of a `FewStepGenerator`. PyTorch takes it as a pytree.

    A `Denoiser` takes it as a condition too, and gives its network the plain condition alone.

    Attributes:
        before: (B, ...) float32, the samples of the rung before. The first rung multiplies them by 0.
        rung: (B,) int64, counted from 0.
        cond: the plain condition.
    """

    before: Tensor
    rung: Tensor
    cond: Any


def plain(cond: Any) -> Any:
    """The plain condition inside an OnRung; any other condition unchanged."""
    return cond.cond if isinstance(cond, OnRung) else cond
