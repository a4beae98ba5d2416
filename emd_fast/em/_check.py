"""Argument checks of the samplers, made before anything is computed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emd_fast.diffusion.denoiser import Condition, unwrap
from emd_fast.em.types import LangevinSettings
from emd_fast.noise import LIMITS, NoiseStream
from emd_fast.ops import _check


def e_step(teacher: Any, z: Tensor, eps: Tensor, t: Tensor, cond: Condition, settings: LangevinSettings) -> None:
    """Checks the arguments of an E-step. Values on a GPU are read, so the host waits once.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.
    """
    _latents(z, eps, t, cond)
    _steps(settings, z)
    _check.step_size(settings.gamma_eps, z, name="gamma_eps", within=_check.GAMMA_EPS, synchronize=True)
    _check.step_size(settings.gamma_z, z, name="gamma_z", within=_check.GAMMA_Z, synchronize=True)
    _check.exact(settings.integrator)
    guidance = settings.guidance
    if isinstance(guidance, Tensor):
        _check.per_sample("guidance", guidance, z, synchronize=True)
    elif guidance is not None:
        if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
            raise TypeError(f"guidance must be a number or a tensor, got {type(guidance).__name__}")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be finite, got {guidance}")
    _check.per_sample("sigma(t)", unwrap(teacher).schedule.sigma(t), z, positive=True, synchronize=True)


def _latents(z: Tensor, eps: Tensor, t: Tensor, cond: Condition) -> None:
    for name, value in (("z", z), ("eps", eps)):
        # The E-step copies both to float32, so float64 is valid too.
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value))}")
        if value.dim() == 0:
            raise ValueError(f"{name} must have a batch dimension, got a tensor without dimensions")
        if len(value) != len(z):
            raise ValueError(f"{name} must have a batch of {len(z)} as z has, got shape {tuple(value.shape)}")
        if value.device != z.device:
            raise ValueError(f"{name} must be on {z.device} as z is, got {value.device}")
    if not isinstance(t, Tensor) or t.dtype != torch.float32:
        raise TypeError(f"t must be a float32 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    _check.tensor("t", t, shape=z.shape[:1], like=z)
    for leaf in pytree.tree_leaves(cond):
        if isinstance(leaf, Tensor) and leaf.shape[:1] != z.shape[:1]:
            raise ValueError(f"cond must hold tensors with a batch of {len(z)}, got shape {tuple(leaf.shape)}")


def _steps(settings: LangevinSettings, z: Tensor) -> None:
    steps, limit = settings.steps, LIMITS["substep"]
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {steps!r}")
    if not 1 <= steps < limit:
        raise ValueError(f"steps must be in [1, {limit}), got {steps}")
    _check.noise(settings.noise, NoiseStream.LANGEVIN_EPS, steps - 1, len(z), z.device, synchronize=True)
