"""Noise schedules: x_t = alpha(t) x + sigma(t) eps, for t (B,) float32 (docs/algorithm.md).

Any object with the members of `Schedule` is a schedule. This module has the common ones. t is the
noise level sigma for `EDM`, and a time in [0, 1] for the others. The noise-to-signal ratio grows
with t in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@runtime_checkable
class Schedule(Protocol):
    """Interface of a noise schedule. All functions are elementwise on float32 tensors.

    `t_min` and `t_max` are the limits of t. `t_from_log_snr` is the inverse of `log_snr`.
    """

    t_min: float
    t_max: float

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def log_snr(self, t: Tensor) -> Tensor: ...

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor: ...


def check_times(schedule: Schedule, t: Tensor) -> Tensor:
    """Returns t after checking that it lies in the domain of the schedule.

    Values are not checked where that would synchronise with a device, and in compiled code.

    Raises:
        ValueError: a time outside of the domain, or not finite.
        TypeError: not a floating-point tensor.
    """
    if not isinstance(t, Tensor) or not t.is_floating_point():
        raise TypeError(f"t must be a floating-point tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.device.type == "cpu" and not torch.compiler.is_compiling() and type(t) is Tensor and t.numel():
        low, high = (end.item() for end in torch.aminmax(t))
        first, last = getattr(schedule, "domain", (schedule.t_min, schedule.t_max))
        if not (first <= low and high <= last and high < math.inf):  # also false for a NaN
            raise ValueError(f"t must be in [{first:g}, {last:g}] for {schedule!r}, got from {low:g} to {high:g}")
    return t


def check_log_snr(log_snr: Tensor) -> Tensor:
    """Returns log_snr after checking that it has no NaN. Infinite values are valid.

    Values are checked where `check_times` checks them.

    Raises:
        ValueError: a NaN.
        TypeError: not a floating-point tensor.
    """
    if not isinstance(log_snr, Tensor) or not log_snr.is_floating_point():
        found = getattr(log_snr, "dtype", type(log_snr).__name__)
        raise TypeError(f"log_snr must be a floating-point tensor, got {found}")
    if log_snr.device.type == "cpu" and not torch.compiler.is_compiling() and bool(log_snr.isnan().any()):
        raise ValueError("log_snr must not be NaN")
    return log_snr


class _Named:
    """Base class: schedules of one class are equal. A class with parameters compares them too."""

    domain: tuple[float, float] = (0.0, 1.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))


class EDM(_Named):
    """Schedule of EDM: alpha = 1, sigma = t (Karras et al., arXiv 2206.00364)."""

    t_min, t_max = 0.002, 80.0
    domain = (0.0, math.inf)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(check_times(self, t))

    def sigma(self, t: Tensor) -> Tensor:
        return check_times(self, t)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(check_times(self, t))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-check_log_snr(log_snr) / 2)


class Cosine(_Named):
    """Cosine schedule: alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Source: Nichol and Dhariwal, arXiv 2102.09672, without their offset.
    """

    # The log-SNR goes from 20 to -20. Beyond that range, adding alpha to sigma (or sigma to alpha)
    # in float32 changes nothing.
    t_min, t_max = 2 / math.pi * math.atan(math.exp(-10)), 2 / math.pi * math.atan(math.exp(10))

    def alpha(self, t: Tensor) -> Tensor:
        # In float32 cos(pi t / 2) would be slightly negative at t = 1.
        return torch.sin(math.pi / 2 * (1 - check_times(self, t)))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * check_times(self, t))

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log(self.alpha(t)) - torch.log(self.sigma(t)))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-check_log_snr(log_snr) / 2))


class RectifiedFlow(_Named):
    """Rectified flow: alpha = 1 - t, sigma = t (Liu et al., arXiv 2209.03003)."""

    t_min, t_max = 1e-4, 1 - 1e-4

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - check_times(self, t)

    def sigma(self, t: Tensor) -> Tensor:
        return check_times(self, t)

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-check_times(self, t)) - torch.log(t))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-check_log_snr(log_snr) / 2)


class VP(_Named):
    """Variance-preserving chain of N betas (Ho et al., arXiv 2006.11239).

    Index i of the chain is t = i / (N - 1). log alpha is interpolated linearly between indices,
    and alpha^2 + sigma^2 = 1.

    Args:
        betas: (N,) numbers in (0, 1), N >= 2.
    """

    t_min, t_max = 0.0, 1.0

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        values = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if values.dim() != 1 or len(values) < 2:
            raise ValueError(f"betas must be a list of at least 2 numbers, got shape {tuple(values.shape)}")
        if not bool(((values > 0) & (values < 1)).all()):
            raise ValueError("betas must lie in (0, 1)")
        self.indices = len(values)
        self._log_alpha = (torch.log1p(-values).cumsum(0) / 2).float()
        self._on: dict[torch.device, Tensor] = {}

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = self._log_alpha.to(device)
        return self._on[device]

    def log_alpha(self, t: Tensor) -> Tensor:
        table = self._table(check_times(self, t).device)
        place = t * (self.indices - 1)
        index = place.long().clamp(0, self.indices - 2)
        return torch.lerp(table[index], table[index + 1], place - index)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def log_snr(self, t: Tensor) -> Tensor:
        twice = 2 * self.log_alpha(t)
        return twice - torch.log(-torch.expm1(twice))

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Returns the t of a log-SNR. A value outside of the chain gives the nearest end."""
        falling = self._table(check_log_snr(log_snr).device)
        log_alpha = (logsigmoid(log_snr) / 2).clamp(falling[-1], falling[0])
        index = torch.searchsorted(-falling, -log_alpha).clamp(1, self.indices - 1)
        before, after = falling[index - 1], falling[index]
        return (index - 1 + (log_alpha - before) / (after - before)) / (self.indices - 1)

    def __repr__(self) -> str:
        return f"VP(betas of {self.indices} indices)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VP) and torch.equal(self._log_alpha, other._log_alpha)

    def __hash__(self) -> int:
        return hash((type(self), self.indices))
