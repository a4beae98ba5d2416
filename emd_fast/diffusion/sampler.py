"""Many-step sampling from a teacher, the baseline of the one-step generator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emd_fast.diffusion.denoiser import Denoiser

_RHO = 7.0
# Range of sigma / alpha of the EDM paper, for data of about unit scale. A schedule may go further
# (a log-SNR of -20 is a ratio of 22,026), but 18 steps would be too few for that range.
_RATIO_MIN, _RATIO_MAX = 0.002, 80.0


@torch.no_grad()
def heun(
    denoiser: Denoiser, z: Tensor, cond: Any = None, steps: int = 18, guidance: float | Tensor | None = None
) -> Tensor:
    """Samples a denoiser: Heun's deterministic second-order method for the probability-flow ODE.

    The ODE is solved for y = x_t / alpha as a function of r = sigma / alpha. It is
    dy/dr = (y - D) / r for every schedule. The grid of r has rho = 7 and goes from 80 to 0.002,
    cut to the range of the schedule, and then to 0.

    Args:
        denoiser: D(x_t; t) of any schedule.
        z: (B, ...) float32 ~ N(0, I). The ODE starts at z times the largest r.
        cond: the condition of the denoiser, batched like z.
        steps: number of steps, at least 2. They take 2 steps - 1 evaluations of the denoiser.
            With guidance each evaluation has a batch of 2 B.
        guidance: scale of classifier-free guidance: None, a number or (B,) float32.

    Returns:
        Samples x (B, ...) float32.

    Raises:
        ValueError: steps below 2, or z without a batch dimension.

    Source: Karras et al. (arXiv 2206.00364), algorithm 1.
    """
    if steps < 2:
        raise ValueError(f"steps must be at least 2, got {steps}")
    if z.dim() == 0:
        raise ValueError("z must have a batch dimension, got a tensor without dimensions")
    ratios = _grid(denoiser, steps)

    def slope(y: Tensor, r: float) -> Tensor:
        t = _time(denoiser, r).to(z.device).expand(len(z))
        alpha = denoiser.schedule.alpha(t).reshape(-1, *[1] * (z.dim() - 1))
        return (y - denoiser.denoise(alpha * y, t, cond, guidance)) / r

    y = z.float() * ratios[0]
    for r, r_next in zip(ratios, [*ratios[1:], 0.0], strict=True):
        before = slope(y, r)
        euler = y + (r_next - r) * before
        # The slope is not defined at r = 0. The last step is an Euler step, which returns D.
        y = euler if r_next == 0 else y + (r_next - r) * (before + slope(euler, r_next)) / 2
    return y


def _grid(denoiser: Denoiser, steps: int) -> list[float]:
    ends = torch.tensor([denoiser.schedule.t_max, denoiser.schedule.t_min], dtype=torch.float32)
    highest, lowest = torch.exp(-denoiser.schedule.log_snr(ends).double() / 2).tolist()
    first, last = min(highest, _RATIO_MAX) ** (1 / _RHO), max(lowest, _RATIO_MIN) ** (1 / _RHO)
    return [(first + i / (steps - 1) * (last - first)) ** _RHO for i in range(steps)]


def _time(denoiser: Denoiser, r: float) -> Tensor:
    """Returns t (1,) float32 at which sigma / alpha is r."""
    return denoiser.schedule.t_from_log_snr(-2 * torch.log(torch.tensor([r], dtype=torch.float32)))
