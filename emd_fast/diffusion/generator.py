"""One-step generator from a denoiser at one noise level."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emd_fast.cache.conditioning import same
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.diffusion.schedules import check_times


class Generator(nn.Module):
    """One-step generator: generator(z, cond) = D(input_scale z; t_star).

    Args:
        denoiser: the denoiser D. Its network is the network of the generator.
        t_star: the noise level, as a t of the schedule.
        input_scale: factor of z, positive. None selects sigma(t_star).

    Raises:
        ValueError: t_star outside the schedule, or an input_scale that is not positive.
    """

    def __init__(self, denoiser: Denoiser, t_star: float, *, input_scale: float | None = None) -> None:
        super().__init__()
        t = check_times(denoiser.schedule, torch.tensor([t_star], dtype=torch.float32, device="cpu"))
        self.denoiser = denoiser
        self.t_star = t_star
        self.input_scale = denoiser.schedule.sigma(t).item() if input_scale is None else input_scale
        if not self.input_scale > 0:
            raise ValueError(f"input_scale must be positive, got {self.input_scale}")
        self.c_skip, self.c_out = (c.item() for c in denoiser.coefficients(t))

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        return self.denoiser.sample_shape

    def forward(self, z: Tensor, cond: Condition = None) -> Tensor:
        """Returns x (B, ...) for z (B, ...) ~ N(0, I)."""
        x_t = self.input_scale * z
        t = same(self._times, len(z), z.device)
        return self.c_skip * x_t + self.c_out * self.denoiser(x_t, t, cond)

    def _times(self, batch: int, device: torch.device) -> Tensor:
        return torch.full((batch,), self.t_star, dtype=torch.float32, device=device)
