"""The fake-score step: denoising score matching on fresh samples of the generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.diffusion.denoiser import Condition, unwrap
from emd_fast.distributed import gathered
from emd_fast.em.types import GeneratorLike


def fake_score_step(
    generator: GeneratorLike, fake_score: Any, z: Tensor, eps: Tensor, t: Tensor, *, cond: Condition = None
) -> Tensor:
    """mean((F - F_target)^2) for each sample of g(z), in the units of the fake score's raw output F.

    Args:
        generator: callable (z, cond) -> x; gets no gradient.
        fake_score: a Denoiser, bare or wrapped.
        z, eps: (B, ...) float32.
        t: (B,) float32.
        cond: as for `e_step`.

    Returns:
        (B,) float32, differentiable in the fake score's parameters.
    """
    inner = unwrap(fake_score)
    alpha, sigma = inner.schedule.alpha(t), inner.schedule.sigma(t)
    # FSDP2 would keep the generator gathered after a pass without a gradient, and miss its next optimizer step.
    with gathered(generator), torch.no_grad():
        x0 = generator(z, cond)
        x_t = ops.perturb(x0, alpha, sigma, eps=eps, dtype=torch.float32)
    c_skip, c_out = inner.coefficients(t)
    return ops.score_matching_loss(fake_score(x_t, t, cond), x0, x_t, c_skip, c_out, c_out.square().reciprocal())
