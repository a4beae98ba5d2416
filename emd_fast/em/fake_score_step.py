"""Fake-score step: denoising score matching on new samples of the generator."""

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
    """Score-matching loss per sample of g(z): mean((F - F_target)^2).

    F is the raw output of the fake score, and F_target the output that denoises exactly.

    Args:
        generator: callable (z, cond) -> x. It gets no gradient.
        fake_score: a Denoiser, bare or wrapped.
        z, eps: (B, ...) float32.
        t: (B,) float32.
        cond: None, a tensor or a pytree of tensors batched on dimension 0.

    Returns:
        Losses (B,) float32, differentiable in the parameters of the fake score.
    """
    inner = unwrap(fake_score)
    alpha, sigma = inner.schedule.alpha(t), inner.schedule.sigma(t)
    # Without `gathered` FSDP2 would keep the generator gathered after a pass without gradients,
    # and miss its next optimizer step.
    with gathered(generator), torch.no_grad():
        x0 = generator(z, cond)
        x_t = ops.perturb(x0, alpha, sigma, eps=eps, dtype=torch.float32)
    c_skip, c_out = inner.coefficients(t)
    return ops.score_matching_loss(fake_score(x_t, t, cond), x0, x_t, c_skip, c_out, c_out.square().reciprocal())
