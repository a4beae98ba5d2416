"""What a step says about the health of a distillation: samples, chains, and the generator's gradient signal.

Everything is computed on the device from what the step left, over the batch of all ranks; docs/logging.md says how to
read it. Nothing here is part of the training.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from emd_fast import distributed
from emd_fast.config import TimeDistribution
from emd_fast.diffusion.denoiser import column
from emd_fast.diffusion.schedules import Schedule
from emd_fast.em.e_step import EStep

BINS = 8
"""Bins of log-SNR, equally wide."""
_BIN = "drift_rms_bin"
SIGNALS = ("drift", "eps")
"""What the M-step regresses on, with and without noise cancellation."""


@dataclass(frozen=True)
class Seen:
    """B samples of this rank, as the M-step had them.

    Args:
        sampled: what the E-step returned.
        first: the first of them in the batch of all ranks.
        generated: (B, ...) g(z_K), without a gradient.
        weight: (B,) float32, that of the loss.
    """

    sampled: EStep
    first: int
    generated: Tensor
    weight: Tensor


@torch.no_grad()
def diagnose(
    seen: Sequence[Seen],
    starts: Iterable[tuple[Tensor, Tensor]],
    *,
    batch: int,
    schedule: Schedule,
    times: TimeDistribution,
) -> dict[str, Tensor]:
    """Device scalars, float32, the same on every rank; all ranks call it. The host waits for no device.

    Args:
        seen: this rank's samples of one step.
        starts: (z_0, eps_0) for each of `seen`.
        batch: the samples of all ranks.
        schedule: of the networks; times: how t was drawn: the bins divide its range of log-SNR.

    Returns:
        sample_mean, sample_std: of all elements of g(z_K).
        z_moved_rms, eps_moved_rms: RMS of z_K - z_0 and of eps_K - eps_0.
        signal_var_drift, signal_var_eps: variance over the batch, averaged over the elements of a sample, of
            weight (alpha / sigma) drift, which is -n times the gradient of a sample's loss to its n elements, and of
            the same with eps_K in place of drift.
        drift_rms_bin0 .. : RMS of drift by log-SNR, from the lowest (most noise) to the highest; NaN for a bin without
            a sample.
    """
    bins = log_snr_bins(schedule, times)
    moved, by_bin = [], []
    for piece, (z, eps) in zip(seen, starts, strict=True):
        sampled, share = piece.sampled, len(piece.sampled.t) / batch
        moved.append(
            torch.stack(
                [
                    piece.generated.float().mean() * share,
                    (sampled.z - z).square().mean() * share,
                    (sampled.eps - eps).square().mean() * share,
                ]
            )
        )
        by_bin.append(_by_bin(sampled, schedule, bins))
    means, binned = _over_ranks(sum(moved[1:], moved[0]), sum(by_bin[1:], by_bin[0]))

    # The mean first, then the squares around it: E[x^2] - E[x]^2 would subtract two large numbers.
    centres = _over_ranks(*(_sum(_signal(piece, which) for piece in seen) / batch for which in SIGNALS))
    squares = [
        torch.stack(
            [
                _square(piece.generated.float() - means[0]) / batch,
                *(
                    _square(_signal(piece, which) - centre) / batch
                    for which, centre in zip(SIGNALS, centres, strict=True)
                ),
            ]
        )
        for piece in seen
    ]
    (variances,) = _over_ranks(sum(squares[1:], squares[0]))
    count, total = binned
    return {
        "sample_mean": means[0],
        "sample_std": variances[0].sqrt(),
        "z_moved_rms": means[1].sqrt(),
        "eps_moved_rms": means[2].sqrt(),
        "signal_var_drift": variances[1],
        "signal_var_eps": variances[2],
        **{f"{_BIN}{i}": value for i, value in enumerate((total / count).sqrt().unbind())},
    }


def contrast(first: int, size: int, batch: int, device: torch.device) -> Tensor:
    """(size,) what each sample from `first` on, of `batch` in all, weighs in a sum of gradients whose squared norm
    estimates the variance of the gradient of the batch, without bias.

    The samples of even and of odd index are two halves whose mean gradients a and b differ by chance alone. Of n and m
    samples, |a - b|^2 n m / (n + m) is on average what one sample's gradient varies by; the mean of the batch, by
    1 / (n + m) of it. The index is that of the whole batch, so that the number is that of any split of it. NaN for a
    batch of one.
    """
    even, odd = (batch + 1) // 2, batch // 2
    if not odd:
        return torch.full((size,), math.nan, device=device)
    is_even = torch.arange(first, first + size, device=device) % 2 == 0
    return torch.full((size,), -((even / odd) ** 0.5), device=device).masked_fill(is_even, (odd / even) ** 0.5)


def is_bin(name: str) -> bool:
    """Whether a value is one of a bin of log-SNR, NaN where no sample fell into it."""
    return name.startswith(_BIN)


def log_snr_bins(schedule: Schedule, times: TimeDistribution) -> tuple[float, float]:
    """(low, width) of the BINS bins: the range in which t is drawn, as far as the schedule goes."""
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float32)
    least, most = schedule.log_snr(ends).tolist()
    low, high = max(least, -2 * math.log(times.high)), min(most, -2 * math.log(times.low))
    return low, (high - low) / BINS


def _by_bin(sampled: EStep, schedule: Schedule, bins: tuple[float, float]) -> Tensor:
    """(2, BINS): samples in each bin, and the sum of their mean squares of drift."""
    low, width = bins
    index = ((schedule.log_snr(sampled.t) - low) / width).floor().clamp(0, BINS - 1)
    inside = index[:, None] == torch.arange(BINS, device=index.device)
    squares = sampled.drift.square().flatten(1).mean(1)
    # where, and not a product: a sample that is not finite belongs to its own bin alone.
    return torch.stack([inside.float().sum(0), torch.where(inside, squares[:, None], 0.0).sum(0)])


def _signal(piece: Seen, which: str) -> Tensor:
    sampled = piece.sampled
    value: Tensor = getattr(sampled, which)
    return column(piece.weight * sampled.alpha / sampled.sigma, value) * value


def _sum(values: Iterable[Tensor]) -> Tensor:
    first, *others = (value.sum(0) for value in values)
    return sum(others, first)


def _square(x: Tensor) -> Tensor:
    """The sum over the samples of the mean square of each."""
    return x.square().mean() * len(x)


def _over_ranks(*parts: Tensor) -> list[Tensor]:
    """Each part summed over the ranks, in one all-reduce."""
    if distributed.world_size() == 1:
        return list(parts)
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    return [own.view_as(part) for own, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
