"""The trainer: owns the networks, the optimizers and the average, and makes one optimizer step at a time.

Reading order: `step`, then the three parts that it calls, in the words of docs/algorithm.md.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from emd_fast import checkpoint, conditions, ops
from emd_fast.config import ConfigError, EMDConfig, StepSize, TimeDistribution, from_dict, to_dict
from emd_fast.denoiser import Condition, Denoiser, Generator, base
from emd_fast.em.e_step import EStep, e_step, frozen
from emd_fast.em.e_step_xz import e_step_xz
from emd_fast.em.m_step import WEIGHTINGS, m_step
from emd_fast.em.student_step import student_step
from emd_fast.ema import EMA
from emd_fast.noise import Noise, Stream

# What may change between two legs of one run; everything else makes it another run.
MAY_CHANGE = {"steps", "max_z_rms", "max_skipped"}


class Diverged(RuntimeError):
    """Training that must not go on: one line that says what was seen and what helps."""


class EMDTrainer:
    """Distils a teacher into a one-step generator.

        trainer = EMDTrainer(teacher, EMDConfig(steps=300, num_classes=10))
        while trainer.steps_done < trainer.config.steps:
            metrics = trainer.step()

    Args:
        teacher: a Denoiser; set to eval and to require no gradients here, its weights never change.
        config: the distillation.
        generator: callable module (z, cond) -> x; a copy of the teacher at noise level t_star when None.
        student: a Denoiser of the teacher's schedule; a copy of the teacher when None.
        prompts: conditions to draw from where `step` is given none, evenly: a tensor or dict of tensors (N, ...), or a
            table of `emd_fast.conditions`. For labels, config.num_classes says as much.

    Raises:
        ValueError: a teacher with weights that are not finite, without a sample_shape, or without the parameters that
            generator and student would start from; two networks that share parameters.
    """

    def __init__(
        self,
        teacher: Denoiser,
        config: EMDConfig,
        generator: nn.Module | None = None,
        student: Denoiser | None = None,
        prompts: Any = None,
    ) -> None:
        if not isinstance(config, EMDConfig):
            raise TypeError(f"config must be an EMDConfig, got {type(config).__name__}")
        _check_finite("teacher", base(teacher))
        if (generator is None or student is None) and not any(True for _ in teacher.parameters()):
            raise ValueError("this teacher has no parameters to start from: give EMDTrainer a generator and a student")
        self.config = config
        self.schedule = base(teacher).schedule
        self.generator = generator if generator is not None else _copy_of(teacher, config)
        self.student = student if student is not None else copy.deepcopy(teacher)
        self.teacher = teacher
        _check_apart(teacher=self.teacher, generator=self.generator, student=self.student)
        for network, trains in ((self.teacher, False), (self.generator, True), (self.student, True)):
            network.eval().requires_grad_(trains)  # eval: no dropout, no batch statistics, in any of the three
        self.device = _device(self.generator)
        self.sample_shape = _shape("sample_shape", generator, teacher)
        self.latent_shape = getattr(self.generator, "latent_shape", None) or self.sample_shape
        self.noise = Noise(config.seed, device=self.device)
        self.generator_optimizer = self._optimizer(self.generator, config.generator_lr)
        self.student_optimizer = self._optimizer(self.student, config.student_lr)
        self.ema = EMA(self.generator, config.ema)
        self.prompts = None if prompts is None else conditions.table(prompts)
        self.skipped = torch.zeros((), device=self.device)
        self.steps_done = 0

    # One step ---------------------------------------------------------------------------------------------------------

    def step(self, cond: Condition = None) -> dict[str, Tensor]:
        """Student updates, E-step, M-step. `cond` (batched, batch_size) is drawn where the configuration has classes.

        Returns:
            Device scalars: generator_loss, student_loss, drift_rms, z_rms, generator_grad_norm, student_grad_norm and
            skipped, the number of updates so far that were left out because their gradient was not finite.
        """
        config = self.config
        self.noise.set(step=self.steps_done)
        self._set_learning_rates()
        if self.steps_done == 0:
            for j in range(config.student_warmup):
                self._student_update(cond, config.student_updates + j)
        student = [self._student_update(cond, j) for j in range(config.student_updates)]
        sampled = self.sample_posterior(cond)
        generator_loss, generator_norm = self._generator_update(sampled)
        self.ema.update(self.generator, self.steps_done)
        self.steps_done += 1
        return {
            "generator_loss": generator_loss,
            "student_loss": torch.stack([loss for loss, _ in student]).mean(),
            "drift_rms": sampled.drift.square().mean().sqrt(),
            "z_rms": sampled.z.square().mean().sqrt(),
            "generator_grad_norm": generator_norm,
            "student_grad_norm": torch.stack([norm for _, norm in student]).mean(),
            "skipped": self.skipped.clone(),
        }

    def sample_posterior(self, cond: Condition = None) -> EStep:
        """The E-step of the current optimizer step."""
        config = self.config
        batch = config.batch_size
        t = self._times(config.time_distribution, Stream.E_STEP_TIME, 0)
        vsd = config.objective == "vsd"
        with self._compute_dtype():
            return (e_step_xz if config.sampling == "x_z" else e_step)(
                self.generator,
                self.teacher,
                self.student,
                ops.normal((batch, *self.latent_shape), self.noise, stream=Stream.E_STEP_Z),
                ops.normal((batch, *self.sample_shape), self.noise, stream=Stream.E_STEP_EPS),
                t,
                cond=self._conditions(cond, 0),
                guidance=config.guidance,
                steps=1 if vsd else config.langevin_steps,
                gamma_eps=self._step_size(config.gamma_eps, t),
                gamma_z=0.0 if vsd else self._step_size(config.gamma_z, t),
                noise=self.noise,
            )

    def _generator_update(self, sampled: EStep) -> tuple[Tensor, Tensor]:
        weight = WEIGHTINGS[self.config.weighting](sampled.alpha, sampled.sigma)
        if self.config.objective == "vsd":
            # The gradient is linear in drift, and drift is gamma_eps times that of score distillation.
            weight = weight / self._step_size(self.config.gamma_eps, sampled.t)
        with self._compute_dtype():
            loss = m_step(self.generator, sampled, weight, noise_cancellation=self.config.noise_cancellation).mean()
        return loss.detach(), self._update(self.generator, self.generator_optimizer, loss)

    def _student_update(self, cond: Condition, substep: int) -> tuple[Tensor, Tensor]:
        batch = self.config.batch_size
        with self._compute_dtype():
            loss = student_step(
                self.generator,
                self.student,
                ops.normal((batch, *self.latent_shape), self.noise, stream=Stream.STUDENT_Z, substep=substep),
                ops.normal((batch, *self.sample_shape), self.noise, stream=Stream.STUDENT_EPS, substep=substep),
                self._times(self.config.student_time_distribution, Stream.STUDENT_TIME, substep),
                cond=self._conditions(cond, 1 + substep),
            ).mean()
        return loss.detach(), self._update(self.student, self.student_optimizer, loss)

    # Its parts --------------------------------------------------------------------------------------------------------

    def _update(self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        """One optimizer step, left out on the device where the gradient is not finite. Returns the gradient's norm."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for p in network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        found_inf = (~torch.isfinite(norm)).float()
        # What GradScaler hands to a fused optimizer: it skips the update without asking the host.
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        self.skipped += found_inf
        optimizer.step()
        return norm

    def _optimizer(self, network: nn.Module, lr: float) -> torch.optim.Optimizer:
        parameters = [p for p in network.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError(f"{type(network).__name__} has no parameters to train")
        return torch.optim.AdamW(
            parameters, lr=lr, betas=self.config.betas, weight_decay=self.config.weight_decay, fused=True
        )

    def _set_learning_rates(self) -> None:
        if not self.config.lr_warmup:
            return
        scale = min(1.0, (self.steps_done + 1) / self.config.lr_warmup)
        for optimizer, lr in (
            (self.generator_optimizer, self.config.generator_lr),
            (self.student_optimizer, self.config.student_lr),
        ):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale

    def _times(self, distribution: TimeDistribution, stream: int, substep: int) -> Tensor:
        size, low, high = (self.config.batch_size,), math.log(distribution.low), math.log(distribution.high)
        if distribution.kind == "log_uniform":
            log_ratio = low + (high - low) * ops.uniform(size, self.noise, stream=stream, substep=substep)
        else:
            normal = ops.normal(size, self.noise, stream=stream, substep=substep)
            log_ratio = (distribution.mean + distribution.std * normal).clamp(low, high)
        return self.schedule.t_from_log_snr(-2 * log_ratio).clamp(self.schedule.t_min, self.schedule.t_max)

    def _step_size(self, size: StepSize, t: Tensor) -> float | Tensor:
        """The number, or (B,) interpolated in log (sigma / alpha) and log value."""
        if not isinstance(size, list):
            return size
        return _interpolate(-self.schedule.log_snr(t) / 2, size)

    def _conditions(self, cond: Condition, substep: int) -> Condition:
        if cond is not None:
            return cond
        size = (self.config.batch_size,)
        if self.prompts is not None:
            # Drawn on the host, which has to look the prompts up, and would wait for the device otherwise.
            host = Noise(self.config.seed, step=self.steps_done)
            drawn = ops.integers(len(self.prompts), size, host, stream=Stream.CONDITION, substep=substep)
            return self._looked_up(drawn)
        if not self.config.num_classes:
            return None
        return ops.integers(self.config.num_classes, size, self.noise, stream=Stream.CONDITION, substep=substep)

    def _looked_up(self, indices: Tensor) -> Condition:
        assert self.prompts is not None
        found = self.prompts[indices]
        return pytree.tree_map(lambda leaf: leaf.to(self.device, non_blocking=True), found)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the networks' passes: bfloat16 by autocast, or float32."""
        precision = self.config.precision
        reduced = precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")
        return torch.bfloat16 if reduced else torch.float32

    def _compute_dtype(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16)

    # Its samples ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, n: int, cond: Condition = None, ema: bool = True, *, first_sample: int = 0) -> Tensor:
        """n samples (n, ...) float32 of the generator, or of its average. The same n for the same seed, every time.

        Args:
            cond: batched conditions; prompts or classes in turn (0, 1, 2, ...) when None and the trainer has some.
            first_sample: where in the stream of shown samples to start.
        """
        z, in_turn = self.shown(n, first_sample)
        # Frozen: PyTorch rounds some products differently where weights require a gradient, wanted or not, and what is
        # exported must give the same samples.
        with self._compute_dtype(), frozen(self.ema.module if ema else self.generator) as generator:
            return generator(z, in_turn if cond is None else cond).float()

    def shown(self, n: int, first_sample: int = 0) -> tuple[Tensor, Condition]:
        """The z (n, ...) of n shown samples, and prompts or classes in turn where the trainer has some."""
        noise = Noise(self.config.seed, first_sample=first_sample, device=self.device)
        z = ops.normal((n, *self.latent_shape), noise, stream=Stream.SHOWN)
        which = range(first_sample, first_sample + n)
        if self.prompts is not None:
            return z, self._looked_up(torch.tensor(which, dtype=torch.int64) % len(self.prompts))
        if self.config.num_classes:
            return z, torch.tensor(which, dtype=torch.int64, device=self.device) % self.config.num_classes
        return z, None

    # Its state --------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Writes everything that the run needs to go on; the teacher is not in it.

        Raises:
            CheckpointError: it cannot be written; what stood at `path` before is intact.
        """
        checkpoint.save(
            path,
            {
                "config": to_dict(self.config),
                "step": self.steps_done,
                "skipped": self.skipped,
                **{name: part.state_dict() for name, part in self._parts().items()},
            },
        )

    @classmethod
    def resume(
        cls,
        path: str | Path,
        teacher: Denoiser,
        *,
        config: EMDConfig | None = None,
        generator: nn.Module | None = None,
        student: Denoiser | None = None,
        prompts: Any = None,
    ) -> EMDTrainer:
        """The trainer that `save` wrote, ready for its next step.

        Args:
            config: replaces the saved one; only steps, max_z_rms and max_skipped may differ.
            generator, student: as for the constructor, where they are not copies of the teacher.
            prompts: as for the constructor; they are not in the file.

        Raises:
            CheckpointError: a missing, truncated or foreign file, another architecture or another configuration.
        """
        state = checkpoint.load(path)
        try:
            saved = from_dict(EMDConfig, state["config"])
        except (ConfigError, KeyError) as error:
            raise checkpoint.CheckpointError(
                f"{path} holds a configuration this release cannot read: {error}"
            ) from None
        for item in dataclasses.fields(EMDConfig):
            was, now = getattr(saved, item.name), getattr(config or saved, item.name)
            if was != now and item.name not in MAY_CHANGE:
                raise checkpoint.CheckpointError(
                    f"{path} was made with {item.name} = {was!r}, not {now!r}; another run needs another folder"
                )
        trainer = cls(teacher, config or saved, generator, student, prompts)
        for name, part in trainer._parts().items():
            try:
                part.load_state_dict(state[name])
            except (KeyError, RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[-1].strip()
                raise checkpoint.CheckpointError(f"{path} does not fit this {name}: {reason}") from error
        trainer.skipped.copy_(state["skipped"])
        trainer.steps_done = state["step"]
        return trainer

    def _parts(self) -> dict[str, Any]:
        return {
            "generator": self.generator,
            "student": self.student,
            "generator_optimizer": self.generator_optimizer,
            "student_optimizer": self.student_optimizer,
            "ema": self.ema.module,
        }


def check_health(metrics: dict[str, float], config: EMDConfig) -> None:
    """Looks at one step's metrics, as numbers.

    Raises:
        Diverged: the run must stop, and why.
    """
    if metrics["skipped"] > config.max_skipped:
        raise Diverged(
            f"{metrics['skipped']:.0f} gradients were not finite (max_skipped = {config.max_skipped}); "
            "the weights are those before them. Try smaller learning rates, or a smaller gamma_z"
        )
    if not metrics["z_rms"] <= config.max_z_rms:  # also true for a NaN
        raise Diverged(
            f"the RMS of z is {metrics['z_rms']:.3g} (max_z_rms = {config.max_z_rms:g}): the Langevin chain of z "
            "diverges. Use a smaller gamma_z, or pairs [sigma, value] that make it small where sigma is small"
        )
    if not math.isfinite(metrics["drift_rms"]):
        raise Diverged("drift is not finite: the teacher or the student returned values that are not finite")


def _copy_of(teacher: Denoiser, config: EMDConfig) -> Generator:
    return Generator(copy.deepcopy(teacher), config.t_star, input_scale=config.input_scale)


def _interpolate(log_ratio: Tensor, table: list[tuple[float, float]]) -> Tensor:
    points = torch.tensor(table, dtype=torch.float32).log().to(log_ratio.device)
    if len(points) == 1:
        return points[0, 1].exp().expand_as(log_ratio)
    x, y = points.unbind(1)
    log_ratio = log_ratio.clamp(x[0], x[-1])
    after = torch.searchsorted(x.contiguous(), log_ratio).clamp(1, len(x) - 1)
    share = (log_ratio - x[after - 1]) / (x[after] - x[after - 1])
    return torch.lerp(y[after - 1], y[after], share).exp()


def _check_finite(name: str, module: nn.Module) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"the {name}'s weights are not finite: {key} holds NaN or infinity")


def _check_apart(**networks: nn.Module) -> None:
    """A generator around the teacher itself, instead of a copy, would train the teacher without a word."""
    owner: dict[int, str] = {}
    for name, network in networks.items():
        for parameter in network.parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"{owner[id(parameter)]} and {name} share parameters: give each its own (deepcopy)")


def _device(module: nn.Module) -> torch.device:
    tensor = next(iter((*module.parameters(), *module.buffers())), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _shape(name: str, *owners: Any) -> tuple[int, ...]:
    for owner in owners:
        shape = getattr(owner, name, None)
        if shape is not None:
            return tuple(shape)
    raise ValueError(f"give the teacher's Denoiser a {name}, so that the trainer knows what to generate")
