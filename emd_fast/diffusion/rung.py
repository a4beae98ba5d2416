"""Condition of a few-step generator: the rung of each sample, and its sample of the rung before."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class OnRung(NamedTuple):
    """Condition of B samples on the rungs of a `FewStepGenerator`. PyTorch takes it as a pytree.

    A `Denoiser` takes it as a condition too. Its network gets the plain condition, and the rung if it takes it.

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


def given(cond: Any, takes_rung: bool) -> tuple[Any, ...]:
    """What a network gets for a condition: the plain one; of an OnRung the rung too, if the network takes it."""
    return (cond.cond, cond.rung) if takes_rung and isinstance(cond, OnRung) else (plain(cond),)
