"""Variance of the generator's gradient over the batch, with and without noise cancellation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from emd_fast.config import EMDConfig
from emd_fast.distributed import gathered
from emd_fast.em.m_step import m_step
from emd_fast.train.diagnostics import StepRecord, check_step, signals
from emd_fast.train.learner import Learner


def gradient_variance(generator: Learner, records: Sequence[StepRecord], config: EMDConfig) -> dict[str, Tensor]:
    """Estimates the variance of the gradient of a step, summed over the elements of the gradient.

    It uses the current weights and costs an M-step for each value. All ranks call it. The generator has no
    gradients afterwards, and training is not affected.

    Args:
        records: this rank's samples of the step.
        config: that of the run; batch_size counts the samples of all ranks.

    Returns:
        Device scalars, the same on every rank and on any number of ranks: generator_grad_var_drift,
        and, where there is a chain, generator_grad_var_eps with eps_K as the target of the regression.

    Raises:
        RuntimeError: there are no records.
    """
    check_step(records)
    found = {}
    for target in signals(config):

        def losses(record: StepRecord, cancels: bool = target == "drift") -> Tensor:
            loss = m_step(generator.network, record.posterior, record.weight, noise_cancellation=cancels)
            return loss * contrast(record.first_sample, len(loss), config.batch_size, loss.device)

        with gathered(generator.network):
            generator.accumulate(records, losses)
        generator.trainable.reduce_gradients()
        found[f"generator_grad_var_{target}"] = generator.trainable.gradient_norms().square().sum()
        generator.trainable.clear_gradients()
    return found


def contrast(first: int, size: int, batch: int, device: torch.device) -> Tensor:
    """(size,) weights of samples `first` and up, for an unbiased estimate of a variance.

    The squared norm of the weighted sum of gradients estimates the variance of the gradient of a
    batch of `batch` samples. Samples of even and of odd index form two halves, whose mean gradients
    a and b differ by chance alone. With n and m samples in them, the mean of
    |a - b|^2 n m / (n + m) is the variance of one sample's gradient; that of the batch mean is
    1 / (n + m) of it. Indices count in the whole batch, so the estimate does not depend on how the
    batch is split. The weights are NaN for a batch of one.
    """
    even, odd = (batch + 1) // 2, batch // 2
    if not odd:
        return torch.full((size,), math.nan, device=device)
    is_even = torch.arange(first, first + size, device=device) % 2 == 0
    return torch.full((size,), -((even / odd) ** 0.5), device=device).masked_fill(is_even, (odd / even) ** 0.5)
