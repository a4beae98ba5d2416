"""Images of the three networks side by side, to look at while they train."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.diffusion.denoiser import Condition
from emd_fast.diffusion.rung import OnRung
from emd_fast.distributed import gathered
from emd_fast.noise import Noise, NoiseStream

if TYPE_CHECKING:
    from emd_fast.train.trainer import EMDTrainer


@torch.no_grad()
def denoised(trainer: EMDTrainer, n: int, cond: Condition = None) -> dict[str, Tensor]:
    """Computes the same n images (n, ...) float32 with each of the three networks. All ranks call it.

    "generator" is x = g(z) of the current weights. "teacher" (with its guidance) and "fake_score"
    are D(alpha x + sigma eps) at the middle of the log-SNR range that time_distribution draws.

    Args:
        cond: as for `EMDTrainer.generate`.
    """
    x = trainer.generate(n, cond, ema=False)
    cond = trainer.batches.shown(n)[1] if cond is None else cond
    # Substep 0 of this stream is z.
    noise = Noise(trainer.config.seed, device=trainer.device)
    eps = ops.normal(x.shape, noise, stream=NoiseStream.SHOWN, substep=1)
    drawn, schedule = trainer.config.time_distribution, trainer.schedule
    middle = torch.full((n,), -math.log(drawn.low * drawn.high), device=trainer.device)
    t = schedule.t_from_log_snr(middle).clamp(schedule.t_min, schedule.t_max)
    x_t = ops.perturb(x, schedule.alpha(t), schedule.sigma(t), eps=eps, dtype=torch.float32)
    last = trainer.config.calls - 1
    on_rung = OnRung(x, torch.full((n,), last, dtype=torch.int64, device=trainer.device), cond) if last else cond
    with gathered(trainer.teacher, trainer.fake_score), trainer.autocast():
        return {
            "generator": x,
            "teacher": trainer.teacher.denoise(x_t, t, cond, trainer.config.guidance),
            "fake_score": trainer.fake_score.denoise(x_t, t, on_rung),
        }
