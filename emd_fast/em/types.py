"""Types of the algorithm: settings of the Langevin chain, its samples, and what an observer sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.noise import Noise

GeneratorLike = Callable[[Tensor, Condition], Tensor]
Networks = tuple[GeneratorLike, Any, Any]
"""Generator, teacher and fake score."""


@dataclass(frozen=True)
class LangevinSettings:
    """Settings of a Langevin chain.

    Attributes:
        steps: K, the number of Langevin steps.
        gamma_eps: step size of eps in (0, 1), a number or (B,) float32.
        gamma_z: step size of z in [0, 1), a number or (B,) float32.
        noise: the Langevin noise: streams 2 and 3, substeps 0 .. K - 1.
        guidance: classifier-free guidance weight of the teacher: None, a number or (B,) float32.
        null_cond: the unconditional condition for guidance; the teacher's own when None.
        integrator: "euler" or "exact": the scale of the noise, as for `ops.langevin_eps`.
        measures: also compute how far the teacher moves each sample (`EStep.teacher_distance`).
        keeps_pass: where z does not move, keep the one pass of the generator with its graph for the
            M-step (`EStep.generated`).
    """

    steps: int
    gamma_eps: float | Tensor
    gamma_z: float | Tensor
    noise: Noise
    guidance: float | Tensor | None = None
    null_cond: Condition = None
    integrator: str = "euler"
    measures: bool = False
    keeps_pass: bool = False

    @property
    def moves_z(self) -> bool:
        """False only if gamma_z is the number 0. A tensor is not read, so no device is awaited."""
        return isinstance(self.gamma_z, Tensor) or self.gamma_z > 0


@dataclass(frozen=True)
class EStep:
    """The posterior samples of an E-step, which the M-step takes.

    Attributes:
        z: z_K (B, ...) float32.
        eps: eps_K (B, ...) float32.
        drift: drift_K (B, ...) float32, eps_K without the noise that the chain added.
        alpha, sigma: of the schedule at t, (B,) float32.
        t: (B,) float32.
        cond: the condition.
        teacher_distance: mean of |x - D_teacher(x_t)| over the elements of each sample, (B,) float32, at the
            last Langevin step, where x is g(z) at its start; None if it was not asked for.
        generated: g(z_K) with its graph to the parameters; None where the M-step has to compute it.
    """

    z: Tensor
    eps: Tensor
    drift: Tensor
    alpha: Tensor
    sigma: Tensor
    t: Tensor
    cond: Condition
    teacher_distance: Tensor | None = None
    generated: Tensor | None = None

    def bare(self) -> EStep:
        """Returns the same samples without `generated`, whose graph holds memory."""
        return dataclasses.replace(self, generated=None)


@dataclass(frozen=True)
class LangevinStep:
    """One Langevin step, as an observer sees it.

    Attributes:
        k: index of the step.
        x0: g(z) (B, ...) at the start of the step.
        delta: the score difference (B, ...) at the start of the step.
        z, eps, drift: (B, ...) float32 at its end. The next step overwrites them.
    """

    k: int
    x0: Tensor
    delta: Tensor
    z: Tensor
    eps: Tensor
    drift: Tensor


Watch = Callable[[LangevinStep], object]
