"""Rollout of a few-step generator in training: the calls before the rung of each sample."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emd_fast.cache.weights import weight_cache
from emd_fast.diffusion.denoiser import Condition
from emd_fast.diffusion.rung import OnRung
from emd_fast.distributed import gathered
from emd_fast.em.frozen import frozen
from emd_fast.em.types import GeneratorLike


@torch.no_grad()
def rollout(
    generator: GeneratorLike,
    rung: Tensor,
    draw: Callable[[int], Tensor],
    cond: Condition = None,
    passes: int | None = None,
) -> OnRung:
    """Calls a few-step generator on the rungs before that of each sample, without gradient.

        found = rollout(generator, rung, draw, cond)
        sampled = e_step(generator, teacher, fake_score, z, eps, t, cond=found, ...)

    A sample on rung j takes part in j passes, so the passes get smaller from rung to rung.

    Args:
        generator: a FewStepGenerator, bare or wrapped by DDP, FSDP2 (gathered once) or torch.compile.
        rung: (B,) int64 from 0, on the CPU: the host selects the samples of each pass by it.
        draw: draw(i) returns z (B, ...) float32 ~ N(0, I) of rung i on the device of the generator.
        cond: the plain condition (B, ...).
        passes: passes to make, at least as many as the highest rung; the highest rung when None. A
            pass that no sample takes part in takes one along, whose result is dropped.

    Returns:
        The condition under which the generator makes the samples of these rungs.
    """
    z = draw(0)
    before = torch.zeros_like(z)
    with gathered(generator), frozen(generator) as g, weight_cache(generator):
        for i in range((int(rung.max()) if len(rung) else 0) if passes is None else passes):
            z = draw(i) if i else z
            taking = (rung > i).nonzero()[:, 0]
            idle = not len(taking)
            taking = (torch.zeros(1, dtype=torch.int64) if idle else taking).to(z.device, non_blocking=True)
            here = torch.full(taking.shape, i, dtype=torch.int64, device=z.device)
            rows = pytree.tree_map_only(Tensor, functools.partial(_rows, taking=taking), cond)
            found = g(z[taking], OnRung(before[taking], here, rows)).float()
            if not idle:
                before[taking] = found
    return OnRung(before, rung.to(z.device, non_blocking=True), cond)


def _rows(leaf: Tensor, taking: Tensor) -> Tensor:
    return leaf[taking]
