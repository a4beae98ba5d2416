"""The E-step: Langevin sampling of (eps, z), with the noise that eps gathered cancelled out in drift."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from emd_fast import ops
from emd_fast.cache.conditioning import conditioning_cache
from emd_fast.cache.weights import weight_cache
from emd_fast.diffusion.denoiser import Condition, base, column
from emd_fast.distributed import gathered
from emd_fast.em.score_difference import ScoreDifference
from emd_fast.noise import Noise
from emd_fast.ops import _check

GeneratorLike = Callable[[Tensor, Condition], Tensor]
MAX_STEPS = 2**16


@dataclass(frozen=True)
class EStep:
    """What an E-step leaves for the M-step: z_K, eps_K, drift (B, ...) float32; alpha, sigma, t (B,); the condition."""

    z: Tensor
    eps: Tensor
    drift: Tensor
    alpha: Tensor
    sigma: Tensor
    t: Tensor
    cond: Condition


@dataclass(frozen=True)
class LangevinStep:
    """Step k as it went, for one who looks on: x0 = g(z) (B, ...) and the score difference delta (B, ...) that it
    started from; z, eps and drift (B, ...) float32 that it left, which the next step overwrites."""

    k: int
    x0: Tensor
    delta: Tensor
    z: Tensor
    eps: Tensor
    drift: Tensor


Watch = Callable[[LangevinStep], object]


def e_step(
    generator: GeneratorLike,
    teacher: Any,
    fake_score: Any,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    *,
    cond: Condition = None,
    null_cond: Condition = None,
    guidance: float | Tensor | None = None,
    steps: int,
    gamma_eps: float | Tensor,
    gamma_z: float | Tensor,
    noise: Noise,
) -> EStep:
    """`steps` Langevin steps on the density proportional to q(x_t) / p(x_t) N(eps) N(z), x_t = alpha g(z) + sigma eps.

    One step is one pass of generator, teacher and fake score and one backward pass of the generator to its input (none
    where gamma_z is the number 0). No parameter gets a gradient, and memory does not grow with `steps`.

    Args:
        generator: callable (z, cond) -> x.
        teacher, fake_score: Denoisers of one schedule, bare or wrapped by DDP, FSDP2 (gathered once) or torch.compile.
        z, eps: (B, ...), floating; not modified.
        t: (B,) float32, held fixed.
        cond: None, a tensor or a pytree of tensors batched on dimension 0.
        null_cond: the teacher's unconditional condition where guidance is used; that of the teacher when None.
        guidance: None, a number or (B,) float32: F = F_u + guidance (F_c - F_u) for the teacher.
        steps: K >= 1.
        gamma_eps, gamma_z: step sizes, a number or (B,) float32, in (0, 1) and [0, 1).
        noise: streams 2 and 3 at substeps 0 .. K - 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range; nothing is computed then.

    Source: Xie et al., arXiv 2405.16852, algorithm 1; docs/algorithm.md.
    """
    check_e_step(z, eps, t, cond, steps, gamma_eps, gamma_z, guidance, noise)
    check_values("sigma(t)", base(teacher).schedule.sigma(t), low=0.0, open_low=True)
    return unchecked_e_step(
        generator,
        teacher,
        fake_score,
        z,
        eps,
        t,
        cond=cond,
        null_cond=null_cond,
        guidance=guidance,
        steps=steps,
        gamma_eps=gamma_eps,
        gamma_z=gamma_z,
        noise=noise,
    )


def unchecked_e_step(
    generator: GeneratorLike,
    teacher: Any,
    fake_score: Any,
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    *,
    cond: Condition = None,
    null_cond: Condition = None,
    guidance: float | Tensor | None = None,
    steps: int,
    gamma_eps: float | Tensor,
    gamma_z: float | Tensor,
    noise: Noise,
    watch: Watch | None = None,
) -> EStep:
    """`e_step` for a caller that made its arguments itself: no value is looked at, so the host waits for nothing.
    `watch` is shown each Langevin step."""
    schedule = base(teacher).schedule
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    moves_z = isinstance(gamma_z, Tensor) or gamma_z > 0

    difference = ScoreDifference(teacher, fake_score, t, cond, null_cond, guidance)
    z, eps = _own(z), _own(eps)
    drift = torch.zeros_like(eps)
    networks = (generator, teacher, fake_score)
    with gathered(*networks), frozen(generator) as g, weight_cache(*networks), conditioning_cache():
        x0 = None
        for k in range(steps):
            if moves_z:
                with torch.enable_grad():
                    latent = z.detach().requires_grad_()
                    x0 = g(latent, cond)
            elif x0 is None:
                with torch.no_grad():
                    x0 = g(z, cond)
            with torch.no_grad():
                x = ops.perturb(x0.detach(), alpha, sigma, eps=eps, dtype=torch.float32)
                cotangent = ops.langevin_eps(
                    eps,
                    drift,
                    x if difference.needs_x else None,
                    difference.outputs(x),
                    difference.coefs,
                    alpha,
                    sigma,
                    step_size=gamma_eps,
                    noise=noise,
                    substep=k,
                    cotangent_dtype=x0.dtype,
                )
            if moves_z:
                (z_grad,) = torch.autograd.grad(x0, latent, cotangent)
                ops.langevin_z(z, z_grad, step_size=gamma_z, noise=noise, substep=k)
            if watch is not None:
                delta = cotangent.float() / column(alpha, cotangent)
                watch(LangevinStep(k, x0.detach(), delta, z, eps, drift))
    return EStep(z, eps, drift, alpha, sigma, t, cond)


def _own(x: Tensor) -> Tensor:
    """A float32 contiguous copy, outside of autograd."""
    return torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(x.detach())


@contextlib.contextmanager
def frozen(generator: GeneratorLike) -> Iterator[GeneratorLike]:
    """The generator with parameters that require no gradient while the block runs.

    autograd.grad to z alone is not enough: compiled graphs and custom backwards compute the gradient of every weight
    that requires one, wanted or not. DDP is taken off: it would wait for gradients that never come. What FSDP2
    has sharded is to be gathered before.
    """
    bare = generator.module if isinstance(generator, DistributedDataParallel) else generator
    trainable = [p for p in bare.parameters() if p.requires_grad] if isinstance(bare, nn.Module) else []
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield bare
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def check_e_step(
    z: Tensor,
    eps: Tensor,
    t: Tensor,
    cond: Condition,
    steps: int,
    gamma_eps: float | Tensor,
    gamma_z: float | Tensor,
    guidance: float | Tensor | None,
    noise: Noise,
) -> None:
    """What both samplers ask of their arguments."""
    for name, value in (("z", z), ("eps", eps)):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {getattr(value, 'dtype', type(value))}")
        if value.dim() == 0:
            raise ValueError(f"{name} must have a batch dimension, got a tensor without dimensions")
        if len(value) != len(z):
            raise ValueError(f"{name} must have a batch of {len(z)} as z has, got shape {tuple(value.shape)}")
    if not isinstance(t, Tensor) or t.dtype != torch.float32:
        raise TypeError(f"t must be a float32 tensor, got {getattr(t, 'dtype', type(t).__name__)}")
    if t.shape != z.shape[:1]:
        raise ValueError(f"t must have shape ({len(z)},), got {tuple(t.shape)}")
    if not isinstance(noise, Noise):
        raise TypeError(f"noise must be an emd_fast.Noise, got {type(noise).__name__}")
    for name, device in (("eps", eps.device), ("t", t.device), ("noise", noise.device)):
        if device != z.device:
            raise ValueError(f"{name} must be on {z.device} as z is, got {device}")
    for leaf in pytree.tree_leaves(cond):
        if isinstance(leaf, Tensor) and leaf.shape[:1] != z.shape[:1]:
            raise ValueError(f"cond must hold tensors with a batch of {len(z)}, got shape {tuple(leaf.shape)}")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {steps!r}")
    if not 1 <= steps < MAX_STEPS:
        raise ValueError(f"steps must be in [1, {MAX_STEPS}), got {steps}")
    if _readable(noise.state) and (offset := noise.state.tolist()[3]) + steps > MAX_STEPS:
        raise ValueError(f"substeps must stay below {MAX_STEPS}, got {steps} steps from substep {offset} of the noise")
    _check.step_size(gamma_eps, z, name="gamma_eps", within=_check.GAMMA_EPS, synchronize=True)
    _check.step_size(gamma_z, z, name="gamma_z", within=_check.GAMMA_Z, synchronize=True)
    if isinstance(guidance, Tensor):
        _check_per_sample("guidance", guidance, z)
        check_values("guidance", guidance)
    elif guidance is not None:
        _check_number("guidance", guidance)
        if not math.isfinite(guidance):
            raise ValueError(f"guidance must be finite, got {guidance}")


def _check_per_sample(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape[:1]:
        raise ValueError(f"{name} must be a number or have shape ({len(like)},), got {tuple(value.shape)}")
    if value.dtype != torch.float32:
        raise TypeError(f"{name} must be a number or float32, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as z is, got {value.device}")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")


def _readable(value: Tensor) -> bool:
    """Whether the host may ask for values: not inside compiled code or a capture."""
    capturing = value.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or capturing or value.is_meta)


def check_values(
    name: str, value: Tensor, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> None:
    """Every value finite, at least (or, open_low, above) low and below high. No check inside a capture."""
    if not _readable(value) or not value.numel():
        return
    smallest, largest = torch.stack(torch.aminmax(value)).tolist()
    inside = math.isfinite(smallest) and (smallest > low if open_low else smallest >= low)
    if not inside or not largest < high:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be in {bracket}{low:g}, {high:g}), got from {smallest:g} to {largest:g}")
