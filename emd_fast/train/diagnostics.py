"""Diagnostics of a training step: samples, Langevin chains, and the generator's gradient signal.

Everything is computed on the device, from what the step left behind, over the batch of all ranks.
Nothing here affects training. docs/evaluation.md explains the variances, docs/getting_started.md the keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from emd_fast import distributed
from emd_fast.config import EMDConfig, TimeDistribution
from emd_fast.diffusion.denoiser import column
from emd_fast.diffusion.schedules import Schedule
from emd_fast.em.types import EStep
from emd_fast.train.batches import BatchSampler

BINS = 8
"""Number of log-SNR bins of equal width."""
_BIN, _RUNG = "drift_rms_bin", "drift_rms_rung"


@dataclass(frozen=True)
class StepRecord:
    """B samples of this rank, as the M-step used them.

    Args:
        posterior: result of the E-step.
        first_sample: index of the first sample in the batch of all ranks.
        generated: (B, ...) g(z_K), detached.
        weight: (B,) float32, the loss weight.
    """

    posterior: EStep
    first_sample: int
    generated: Tensor
    weight: Tensor


def signals(config: EMDConfig) -> tuple[str, ...]:
    """Targets of the M-step's regression: with noise cancellation, and without it where there is a chain of eps."""
    return ("drift", "eps") if has_chain(config) else ("drift",)


def has_chain(config: EMDConfig) -> bool:
    """Whether the E-step moves eps. With objective "sid" it does not: there, drift is the gradient of a loss."""
    return config.objective != "sid"


def check_step(records: Sequence[StepRecord]) -> None:
    """Raises RuntimeError if no step was made."""
    if not records:
        raise RuntimeError("diagnostics need a step: call step() first")


def mean_square(posteriors: Sequence[EStep], name: str, batch_size: int) -> Tensor:
    """This rank's part of the mean of the square of an attribute over the batch of all ranks."""
    tensors: list[Tensor] = [getattr(posterior, name) for posterior in posteriors]
    shares = [x.square().mean() * (len(x) / batch_size) for x in tensors]
    return sum(shares[1:], shares[0])


@torch.no_grad()
def diagnose(records: Sequence[StepRecord], batches: BatchSampler) -> dict[str, Tensor]:
    """Computes the diagnostics of one step. All ranks call it. The host does not wait.

    Args:
        records: this rank's samples of one step.
        batches: sampler of the step; it draws (z_0, eps_0) once more. The bins divide the log-SNR range
            of its distribution of t.

    Returns:
        Device scalars, float32, the same on every rank:

        sample_mean, sample_std: over all elements of g(z_K).
        z_moved_rms, eps_moved_rms: RMS of z_K - z_0 and of eps_K - eps_0, where there is a chain.
        signal_var_drift: variance over the batch of weight (alpha / sigma) drift, averaged over
            the n elements of a sample. That quantity is -n times the gradient of a sample's loss
            with respect to its elements.
        signal_var_eps: the same with eps_K in place of drift, where there is a chain.
        drift_rms_bin0 .. : RMS of drift by log-SNR, from the lowest (most noise) to the highest;
            NaN for a bin without a sample.
        drift_rms_rung0 .. : RMS of drift by rung, where the generator has several; NaN likewise.

    Raises:
        RuntimeError: there are no records.
    """
    check_step(records)
    batch, schedule = batches.config.batch_size, batches.schedule
    bins = log_snr_bins(schedule, batches.config.time_distribution)
    rungs = batches.config.calls if batches.config.calls > 1 else 0
    moved, grouped = [], []
    for record in records:
        posterior, size = record.posterior, len(record.posterior.t)
        z, eps = batches.e_step(record.first_sample, size)
        share = size / batch
        moved.append(
            torch.stack(
                [
                    record.generated.float().mean() * share,
                    (posterior.z - z).square().mean() * share,
                    (posterior.eps - eps).square().mean() * share,
                ]
            )
        )
        groups = [_squares_by(_bin_of(posterior, schedule, bins), posterior, BINS)]
        if rungs:
            groups.append(_squares_by(posterior.cond.rung, posterior, rungs))
        grouped.append(torch.cat(groups, dim=1))
    means, (count, total) = _over_ranks(sum(moved[1:], moved[0]), sum(grouped[1:], grouped[0]))

    # The variance takes two passes: E[x^2] - E[x]^2 would subtract two large numbers.
    targets = signals(batches.config)
    centres = _over_ranks(*(_sum(_signal(record, which) for record in records) / batch for which in targets))
    squares = [
        torch.stack(
            [
                _square(record.generated.float() - means[0]) / batch,
                *(
                    _square(_signal(record, which) - centre) / batch
                    for which, centre in zip(targets, centres, strict=True)
                ),
            ]
        )
        for record in records
    ]
    (variances,) = _over_ranks(sum(squares[1:], squares[0]))
    moves = {"z_moved_rms": means[1].sqrt(), "eps_moved_rms": means[2].sqrt()} if has_chain(batches.config) else {}
    names = [*(f"{_BIN}{i}" for i in range(BINS)), *(f"{_RUNG}{j}" for j in range(rungs))]
    return {
        "sample_mean": means[0],
        "sample_std": variances[0].sqrt(),
        **moves,
        **{f"signal_var_{which}": variance for which, variance in zip(targets, variances[1:], strict=True)},
        **dict(zip(names, (total / count).sqrt().unbind(), strict=True)),
    }


def is_group(name: str) -> bool:
    """Whether a diagnostic of this name belongs to a log-SNR bin or a rung, which is NaN without samples."""
    return name.startswith((_BIN, _RUNG))


def log_snr_bins(schedule: Schedule, times: TimeDistribution) -> tuple[float, float]:
    """(low, width) of the BINS bins over the log-SNR range of t, cut to the schedule's."""
    ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float32)
    least, most = schedule.log_snr(ends).tolist()
    low, high = max(least, -2 * math.log(times.high)), min(most, -2 * math.log(times.low))
    return low, (high - low) / BINS


def _bin_of(posterior: EStep, schedule: Schedule, bins: tuple[float, float]) -> Tensor:
    low, width = bins
    return ((schedule.log_snr(posterior.t) - low) / width).floor().clamp(0, BINS - 1)


def _squares_by(index: Tensor, posterior: EStep, groups: int) -> Tensor:
    """(2, groups): the number of samples with each index (B,), and the sum of their mean squares of drift."""
    inside = index[:, None] == torch.arange(groups, device=index.device)
    squares = posterior.drift.square().flatten(1).mean(1)
    # A multiplication in place of `where` would spread a sample that is not finite to every group.
    return torch.stack([inside.float().sum(0), torch.where(inside, squares[:, None], 0.0).sum(0)])


def _signal(record: StepRecord, which: str) -> Tensor:
    posterior = record.posterior
    value: Tensor = getattr(posterior, which)
    return column(record.weight * posterior.alpha / posterior.sigma, value) * value


def _sum(values: Iterable[Tensor]) -> Tensor:
    first, *others = (value.sum(0) for value in values)
    return sum(others, first)


def _square(x: Tensor) -> Tensor:
    """Sum over the samples of the mean square of each."""
    return x.square().mean() * len(x)


def _over_ranks(*parts: Tensor) -> list[Tensor]:
    """Sums each part over the ranks in one all-reduce."""
    if distributed.world_size() == 1:
        return list(parts)
    flat = torch.cat([part.reshape(-1) for part in parts])
    dist.all_reduce(flat)
    return [own.view_as(part) for own, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
