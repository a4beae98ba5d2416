"""Generator of several calls from a denoiser at several noise levels, its rungs (docs/few_steps.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from emd_fast.cache.conditioning import same
from emd_fast.diffusion.denoiser import Condition, Denoiser, column
from emd_fast.diffusion.rung import OnRung
from emd_fast.diffusion.schedules import check_times


class FewStepGenerator(nn.Module):
    """Generator of n calls at falling noise levels t_1 > ... > t_n, the rungs.

        x_1     = D(sigma(t_1) z_1; t_1)
        x_{j+1} = D(alpha(t_{j+1}) x_j + sigma(t_{j+1}) z_{j+1}; t_{j+1})

    `sample` makes all calls. One call is generator(z, cond) for the first rung, and
    generator(z, OnRung(x, rung, cond)) for a rung of each sample, with x of the rung before. With
    `emd_fast.em.few_step.rollout` this is a generator for `e_step`, `m_step` and
    `fake_score_step`. With one rung it is `Generator`.

    Args:
        denoiser: the denoiser D. Its network is the network of the generator.
        times: t_1 .. t_n, each a t of the schedule.
        input_scale: factor of z_1, positive. None selects sigma(t_1).

    Raises:
        ValueError: times that do not fall or lie outside the schedule, a rung without noise, or an
            input_scale that is not positive.
    """

    def __init__(self, denoiser: Denoiser, times: Sequence[float], input_scale: float | None = None) -> None:
        super().__init__()
        t = torch.tensor(list(times), dtype=torch.float32, device="cpu")
        if not len(t):
            raise ValueError("times must have at least one noise level, got none")
        schedule = denoiser.schedule
        alpha, scale = schedule.alpha(check_times(schedule, t)), schedule.sigma(t).clone()
        if not bool((t[1:] < t[:-1]).all()):
            raise ValueError(f"times must fall from rung to rung, got {', '.join(f'{each:g}' for each in times)}")
        if input_scale is not None:
            scale[0] = input_scale
        if not scale[0] > 0:
            raise ValueError(f"input_scale must be positive, got {scale[0]:g}")
        if not bool((scale > 0).all()):
            raise ValueError(f"times must have noise at every rung, got sigma = 0 at {times[-1]:g}")
        alpha[0] = 0
        self.denoiser = denoiser
        self.times = tuple(t.tolist())
        self.input_scale: float = schedule.sigma(t[:1]).item() if input_scale is None else input_scale
        # (t, alpha, scale of z, c_skip, c_out) by rung, (5, n). No buffer: a conversion of the module to bfloat16 would
        # round the times.
        self.values = torch.stack([t, alpha, scale, *denoiser.coefficients(t)])
        # Filled here for the CPU: an entry that is made in compiled code would make it compile a second time.
        self._on: dict[torch.device, Tensor] = {self.values.device: self.values}
        self._c_skip, self._c_out = self.values[3:, 0].tolist()

    @property
    def sample_shape(self) -> tuple[int, ...] | None:
        return self.denoiser.sample_shape

    @property
    def t_star(self) -> float:
        """The noise level of the first rung."""
        return self.times[0]

    def forward(self, z: Tensor, cond: Condition = None) -> Tensor:
        """Returns x (B, ...) of one call, for z (B, ...) ~ N(0, I).

        Args:
            cond: an OnRung; or the plain condition, for the first rung.
        """
        before, rung, plain = cond if isinstance(cond, OnRung) else (None, None, cond)
        if len(self.times) == 1:  # numbers round as those of `Generator` in every dtype
            x_t = self.input_scale * z
            return self._c_skip * x_t + self._c_out * self.denoiser(x_t, same(self._full, len(z), z.device), plain)
        if rung is None:
            rung = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        t, alpha, scale, c_skip, c_out = same(self._at, rung)
        x_t = column(scale, z) * z
        if before is not None:
            x_t = column(alpha, before) * before + x_t
        return column(c_skip, x_t) * x_t + column(c_out, x_t) * self.denoiser(x_t, t, plain)

    def sample(self, noises: Sequence[Tensor], cond: Condition = None) -> list[Tensor]:
        """Samples x_1 .. x_m in m calls, m <= n.

        Args:
            noises: z_1 .. z_m, each (B, ...) ~ N(0, I).
            cond: the plain condition.

        Raises:
            ValueError: no noise, or noises for more calls than there are rungs.
        """
        check_calls(len(noises), len(self.times))
        samples = [self(noises[0], cond)]
        for j, z in enumerate(noises[1:], 1):
            rung = torch.full((len(z),), j, dtype=torch.int64, device=z.device)
            samples.append(self(z, OnRung(samples[-1], rung, cond)))
        return samples

    def _full(self, batch: int, device: torch.device) -> Tensor:
        return torch.full((batch,), self.times[0], dtype=torch.float32, device=device)

    def _at(self, rung: Tensor) -> tuple[Tensor, ...]:
        """(t, alpha, scale of z, c_skip, c_out) at the rungs (B,) of samples, (B,) float32 each."""
        if rung.device not in self._on:  # made once: a copy to the device makes the host wait
            self._on[rung.device] = self.values.to(rung.device)
        return self._on[rung.device][:, rung].unbind()


def check_calls(calls: int, rungs: int) -> int:
    """Returns a number of calls after checking that there are as many rungs.

    Raises:
        ValueError: it is not in [1, rungs].
    """
    if not 1 <= calls <= rungs:
        raise ValueError(f"calls must be in [1, {rungs}], the rungs of this generator, got {calls}")
    return calls
