"""The trainer: owns the networks, the optimizers and the average, and makes one optimizer step at a time.

Reading order: `step`, then the three parts that it calls, in the words of docs/algorithm.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from emd_fast import checkpoint, conditions, diagnostics, distributed, ema, ops, optimizers
from emd_fast.config import ConfigError, EMDConfig, StepSize, TimeDistribution, from_dict, to_dict
from emd_fast.denoiser import Condition, Denoiser, Generator, base
from emd_fast.diagnostics import Seen
from emd_fast.distributed import Shards, gathered
from emd_fast.em.e_step import EStep, Watch, frozen, unchecked_e_step
from emd_fast.em.e_step_xz import e_step_xz
from emd_fast.em.m_step import WEIGHTINGS, m_step
from emd_fast.em.student_step import student_step
from emd_fast.fingerprint import fingerprint
from emd_fast.graphs import GraphedEStep
from emd_fast.noise import Noise, Stream
from emd_fast.recompute import recomputed
from emd_fast.rounded import rounded, trainable
from emd_fast.throughput import Laps
from emd_fast.unet.plan import fuse_known, fusion_report, unfuse

# What may change between two legs of one run; everything else makes it another run. They change time, memory, limits
# and the order in which numbers are summed.
MAY_CHANGE = {
    "steps",
    "max_z_rms",
    "max_skipped",
    "micro_batch_size",
    "parallel",
    "shard_group",
    "fuse",
    "compile",
    "cuda_graph",
    "activation_checkpointing",
}


class Diverged(RuntimeError):
    """Training that must not go on: one line that says what was seen and what helps. All ranks raise it alike, and the
    main one alone has to say it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.main = distributed.is_main()


@dataclass(frozen=True)
class _Piece:
    """Some samples of the global batch, which this rank takes through the networks at once."""

    first: int
    size: int
    cond: Condition


class EMDTrainer:
    """Distils a teacher into a one-step generator.

        trainer = EMDTrainer(teacher, EMDConfig(steps=300, num_classes=10))
        while trainer.steps_done < trainer.config.steps:
            metrics = trainer.step()

    Under a process group (`emd_fast.distributed.process_group`) every rank builds the same trainer and makes the same
    calls; the networks are spread over the ranks as `config.parallel` says, and each rank takes its share of the batch.
    Networks too large to be built by every rank may be on the meta device on all ranks but the first.

    Args:
        teacher: a Denoiser; its weights never change. Set to eval and to require no gradients here, fused where
            config.fuse says so and sharded where config.parallel shards. Replicas and single processes that compute in
            bfloat16 leave it as it is and keep a copy of their own with bfloat16 weights (`emd_fast.rounded`): drop
            yours, or its float32 weights stay.
        config: the distillation.
        generator: callable module (z, cond) -> x; a copy of the teacher at noise level t_star when None.
        student: a Denoiser of the teacher's schedule; a copy of the teacher when None.
        prompts: conditions to draw from where `step` is given none, evenly: a tensor or dict of tensors (N, ...), or a
            table of `emd_fast.conditions`. For labels, config.num_classes says as much.

    Raises:
        GroupError: ranks with another configuration or other code; groups that do not make up the ranks.
        ValueError: a teacher with weights that are not finite, without a sample_shape, or without the parameters that
            generator and student would start from; two networks that share parameters; fewer samples than ranks;
            networks that somebody else has wrapped in DDP or FSDP2; activation_checkpointing of networks without
            blocks.
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
        distributed.check_same(to_dict(config))
        if config.batch_size < distributed.world_size():
            raise ConfigError(
                f"batch_size must be at least the number of ranks, {distributed.world_size()}, got {config.batch_size}"
            )
        _check_bare(teacher=teacher, generator=generator, student=student)
        _check_finite("teacher", base(teacher))
        if (generator is None or student is None) and not any(True for _ in teacher.parameters()):
            raise ValueError("this teacher has no parameters to start from: give EMDTrainer a generator and a student")
        self.config = config
        self.schedule = base(teacher).schedule
        # Of the weights as they were given; the main rank's, which the others take over.
        self._teacher_facts: dict[str, Any] = distributed.on_main(
            lambda: {"path": base(teacher).source, "sha256": fingerprint(base(teacher))}
        )
        self.generator = generator if generator is not None else _copy_of(teacher, config)
        self.student = student if student is not None else trainable(teacher)
        _check_apart(teacher=teacher, generator=self.generator, student=self.student)
        self.device = distributed.device_of(self.generator)
        self._mode, reason = distributed.resolve(config.parallel, sum(p.numel() for p in self.generator.parameters()))
        self.parallel = f"{self._mode}: {reason}"
        rounds = self._mode == "replicate" and self.compute_dtype != torch.float32
        self.teacher = rounded(teacher, self.compute_dtype) if rounds else teacher
        for network, trains in ((self.teacher, False), (self.generator, True), (self.student, True)):
            network.eval().requires_grad_(trains)  # eval: no dropout, no batch statistics, in any of the three
        self.sample_shape = _shape("sample_shape", generator, teacher)
        self.latent_shape = getattr(self.generator, "latent_shape", None) or self.sample_shape
        self.noise = Noise(config.seed, device=self.device)
        if config.fuse:
            _fuse(self.teacher, self.generator, self.student, compile=config.compile)
        self.ema = ema.EMA(self.generator, _profile(config))
        self._spread()
        self.shards = {"generator": Shards(self.generator), "student": Shards(self.student)}
        self.generator_optimizer = optimizers.make(config, self.shards["generator"].parameters, config.generator_lr)
        self.student_optimizer = optimizers.make(config, self.shards["student"].parameters, config.student_lr)
        networks = (self.generator, self.teacher, self.student)
        if config.activation_checkpointing:
            for name, shards in self.shards.items():
                if not distributed.blocks_of(shards.network):
                    raise ConfigError(
                        f"activation_checkpointing must be False: the {name} has no blocks (entries of a ModuleList) "
                        "that could be computed again one at a time"
                    )
        self._graphed = (
            GraphedEStep(*networks, steps=self._langevin_steps(), guidance=config.guidance, noise=self.noise)
            if config.cuda_graph
            else None
        )
        self.prompts = None if prompts is None else conditions.table(prompts)
        self.skipped = torch.zeros((), device=self.device)
        self.steps_done = 0
        self._tables: dict[Any, Tensor] = {}
        self._seen: list[Seen] = []
        self.laps = Laps(self.device)  # of the last step: student, e_step, m_step
        self._writer = checkpoint.Writer()

    def _spread(self) -> None:
        """Lays the networks out over the ranks."""
        if distributed.world_size() > 1:
            mesh = distributed.make_mesh(self._mode, self.device, self.config.shard_group)
            precision = torch.bfloat16 if self.compute_dtype == torch.bfloat16 else None
            for network in (self.teacher, self.generator, self.student, self.ema.module):
                # The average is float32 throughout: it is what a run is for.
                own = None if network is self.ema.module else precision
                distributed.shard(network, self._mode, precision=own, mesh=mesh, device=self.device)

    # One step ---------------------------------------------------------------------------------------------------------

    def step(self, cond: Condition = None) -> dict[str, Tensor]:
        """Student updates, E-step, M-step. `cond` (batched, batch_size: that of all ranks) is drawn where the
        configuration has classes.

        Returns:
            Device scalars, the same on every rank: generator_loss, student_loss, drift_rms, z_rms, generator_grad_norm,
            student_grad_norm and skipped, the number of updates so far that were left out because their gradient was
            not finite.
        """
        self._seen = []  # that of the step before: its memory is needed now
        self.laps.start()
        student = self.update_student(cond)
        self.laps.end("student")
        with gathered(self.generator):
            sampled = self._e_steps(cond)
            self.laps.end("e_step")
            generator_loss = self._generator_loss(sampled)
        generator_norm = self._update("generator")
        self.ema.update(self.generator, self.steps_done)
        self.laps.end("m_step")
        self.steps_done += 1
        means = torch.stack(
            [
                generator_loss,
                torch.stack([loss for loss, _ in student]).mean(),
                self._mean_square(s.drift for s in sampled),
                self._mean_square(s.z for s in sampled),
            ]
        )
        if distributed.world_size() > 1:
            dist.all_reduce(means)
        return {
            "generator_loss": means[0],
            "student_loss": means[1],
            "drift_rms": means[2].sqrt(),
            "z_rms": means[3].sqrt(),
            "generator_grad_norm": generator_norm,
            "student_grad_norm": torch.stack([norm for _, norm in student]).mean(),
            "skipped": self.skipped.clone(),
        }

    def diagnostics(self) -> dict[str, Tensor]:
        """What emd_fast/diagnostics.py says about the last step: device scalars, the same on every rank. All ranks call
        it, on the steps that are logged; the training does not notice.

        Raises:
            RuntimeError: no step was made.
        """
        seen = self._last_seen()
        return diagnostics.diagnose(
            seen,
            (self._start(one.first, len(one.sampled.t)) for one in seen),
            batch=self.config.batch_size,
            schedule=self.schedule,
            times=self.config.time_distribution,
        )

    def gradient_variance(self) -> dict[str, Tensor]:
        """What noise cancellation does to the gradient of the generator's parameters: the variance of that of the last
        step (the sum over its elements), whose norm is generator_grad_norm, on the samples of that step and with the
        weights as they are now. Costs two M-steps. All ranks call it; the generator has no gradients afterwards, and
        the training does not notice.

        Returns:
            Device scalars, the same on every rank, on any number of them: generator_grad_var_drift, and
            generator_grad_var_eps with eps_K as the target of the regression.

        Raises:
            RuntimeError: no step was made.
        """
        shards, found = self.shards["generator"], {}
        for target in diagnostics.SIGNALS:

            def loss_of(seen: Seen, cancels: bool = target == "drift") -> Tensor:
                loss = m_step(self.generator, seen.sampled, seen.weight, noise_cancellation=cancels)
                return loss * diagnostics.contrast(seen.first, len(loss), self.config.batch_size, loss.device)

            with gathered(self.generator):
                self._accumulate("generator", self._last_seen(), loss_of)
            shards.reduce_gradients()
            found[f"generator_grad_var_{target}"] = shards.gradient_norms().square().sum()
            shards.clear_gradients()
        return found

    def _last_seen(self) -> list[Seen]:
        if not self._seen:
            raise RuntimeError("diagnostics are those of a step: call step() first")
        return self._seen

    def update_student(self, cond: Condition = None) -> list[tuple[Tensor, Tensor]]:
        """The first part of a step, alone: the student's updates, after its warm-up where this is the first step.

        Returns:
            For each update but those of the warm-up: the loss of this rank's samples, the norm of the whole gradient.
        """
        config = self.config
        self.noise.set(step=self.steps_done)
        self._set_learning_rates()
        if self.steps_done == 0:
            for j in range(config.student_warmup):
                self._student_update(cond, config.student_updates + j)
        return [self._student_update(cond, j) for j in range(config.student_updates)]

    def sample_posterior(
        self,
        cond: Condition = None,
        *,
        step: int | None = None,
        samples: range | None = None,
        watch: Watch | None = None,
    ) -> EStep:
        """An E-step with the weights as they are.

        Args:
            cond: as for `step`.
            step: the optimizer step whose noise it takes; where the noise stands when None.
            samples: those of the global batch, all of this rank when None.
            watch: is shown each Langevin step.
        """
        if step is not None:
            self.noise.set(step=step)
        if samples is None:
            samples = range(*distributed.share(self.config.batch_size))
        return self._e_step(self._piece(cond, 0, samples.start, samples.stop), watch)

    def _e_steps(self, cond: Condition) -> list[EStep]:
        # Every network is gathered once for all Langevin steps of all pieces; two of the three are let go before the
        # M-step asks for its activations.
        with gathered(self.generator, self.teacher, self.student):
            return [self._e_step(piece) for piece in self._pieces(cond, 0)]

    def _e_step(self, piece: _Piece, watch: Watch | None = None) -> EStep:
        config = self.config
        z, eps = self._start(piece.first, piece.size)
        t = self._times(config.time_distribution, Stream.E_STEP_TIME, 0, piece.size)
        vsd = config.objective == "vsd"
        gamma_eps = self._step_size(config.gamma_eps, t)
        gamma_z = 0.0 if vsd else self._step_size(config.gamma_z, t)
        with self._compute_dtype():
            if self._graphed is not None and watch is None:
                return self._graphed(z, eps, t, piece.cond, gamma_eps=gamma_eps, gamma_z=gamma_z)
            return (e_step_xz if config.sampling == "x_z" else unchecked_e_step)(
                self.generator,
                self.teacher,
                self.student,
                z,
                eps,
                t,
                cond=piece.cond,
                guidance=config.guidance,
                steps=self._langevin_steps(),
                gamma_eps=gamma_eps,
                gamma_z=gamma_z,
                noise=self.noise,
                watch=watch,
            )

    def _start(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """z_0 and eps_0 of so many samples of this optimizer step."""
        self.noise.set(first_sample=first)
        return (
            ops.normal((size, *self.latent_shape), self.noise, stream=Stream.E_STEP_Z),
            ops.normal((size, *self.sample_shape), self.noise, stream=Stream.E_STEP_EPS),
        )

    def _langevin_steps(self) -> int:
        return 1 if self.config.objective == "vsd" else self.config.langevin_steps

    def _generator_loss(self, sampled: Sequence[EStep]) -> Tensor:
        """This rank's part of the M-step's loss; leaves its gradient, and what `diagnostics` looks at."""

        first, _ = distributed.share(self.config.batch_size)

        def loss_of(piece: EStep) -> Tensor:
            weight = WEIGHTINGS[self.config.weighting](piece.alpha, piece.sigma)
            if self.config.objective == "vsd":
                # The gradient is linear in drift, and drift is gamma_eps times that of score distillation.
                weight = weight / self._step_size(self.config.gamma_eps, piece.t)

            def watched(z: Tensor, cond: Condition) -> Tensor:
                generated = self.generator(z, cond)
                before = sum(len(seen.sampled.t) for seen in self._seen)
                self._seen.append(Seen(piece, first + before, generated.detach(), weight))
                return generated

            return m_step(watched, piece, weight, noise_cancellation=self.config.noise_cancellation)

        return self._accumulate("generator", sampled, loss_of)

    def _student_update(self, cond: Condition, substep: int) -> tuple[Tensor, Tensor]:
        def loss_of(piece: _Piece) -> Tensor:
            self.noise.set(first_sample=piece.first)
            return student_step(
                self.generator,
                self.student,
                ops.normal((piece.size, *self.latent_shape), self.noise, stream=Stream.STUDENT_Z, substep=substep),
                ops.normal((piece.size, *self.sample_shape), self.noise, stream=Stream.STUDENT_EPS, substep=substep),
                self._times(self.config.student_time_distribution, Stream.STUDENT_TIME, substep, piece.size),
                cond=piece.cond,
            )

        with gathered(self.generator, self.student):
            loss = self._accumulate("student", self._pieces(cond, 1 + substep), loss_of)
        return loss, self._update("student")

    # Its parts, over pieces and ranks ---------------------------------------------------------------------------------

    def _pieces(self, cond: Condition, substep: int) -> list[_Piece]:
        """This rank's samples by micro-batches."""
        first, last = distributed.share(self.config.batch_size)
        size = self.config.micro_batch_size or last - first
        return [self._piece(cond, substep, start, min(start + size, last)) for start in range(first, last, size)]

    def _piece(self, cond: Condition, substep: int, start: int, end: int) -> _Piece:
        self.noise.set(first_sample=start)
        return _Piece(start, end - start, self._conditions(cond, substep, start, end))

    def _accumulate(self, name: str, pieces: Sequence[Any], loss_of: Callable[[Any], Tensor]) -> Tensor:
        """The sum of the losses over this rank's samples, divided by the global batch; leaves its gradient."""
        shards = self.shards[name]
        shards.clear_gradients()
        total = torch.zeros((), device=self.device)
        for number, piece in enumerate(pieces, 1):
            distributed.sync_gradients(shards.network, number == len(pieces))
            recomputes = (
                recomputed(shards.network) if self.config.activation_checkpointing else contextlib.nullcontext()
            )
            with self._compute_dtype(), recomputes:
                loss = loss_of(piece).sum() / self.config.batch_size
            loss.backward()
            total = total + loss.detach()
        return total

    def _update(self, name: str) -> Tensor:
        """One optimizer step on the gradients of all ranks, left out on all of them, on the device, where a gradient
        is not finite. Returns the norm of the whole gradient."""
        shards, optimizer = self.shards[name], self._optimizers()[name]
        shards.reduce_gradients()
        norms = shards.gradient_norms()
        norm = torch.linalg.vector_norm(norms)
        if self.config.grad_clip:
            nn.utils.clip_grads_with_norm_(shards.parameters, self.config.grad_clip, norm)
        finite = torch.isfinite(norm)
        shards.note_bad(norms)
        self.skipped += (~finite).float()
        if optimizers.skips_on_device(optimizer):
            # What GradScaler hands to a fused optimizer: it skips the update without asking the host.
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif bool(finite):
            optimizer.step()
        return norm

    def culprit(self) -> str | None:
        """The network and the tensor whose gradient was not finite last, or None; asks the device."""
        for name, shards in self.shards.items():
            if (tensor := shards.bad()) is not None:
                return f"{tensor} of the {name}"
        return None

    def _mean_square(self, tensors: Iterable[Tensor]) -> Tensor:
        """This rank's part of the mean over the global batch."""
        return sum(
            (x.square().mean() * (len(x) / self.config.batch_size) for x in tensors),
            torch.zeros((), device=self.device),
        )

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"generator": self.generator_optimizer, "student": self.student_optimizer}

    def _set_learning_rates(self) -> None:
        scale = optimizers.rate_scale(self.config, self.steps_done)
        rates = {"generator": self.config.generator_lr, "student": self.config.student_lr}
        for name, optimizer in self._optimizers().items():
            optimizers.set_rate(optimizer, rates[name] * scale)

    def _times(self, distribution: TimeDistribution, stream: int, substep: int, batch: int | None = None) -> Tensor:
        size = (self.config.batch_size if batch is None else batch,)
        low, high = math.log(distribution.low), math.log(distribution.high)
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
        key = tuple(map(tuple, size))
        if key not in self._tables:  # made once: copying it to the device makes the host wait
            self._tables[key] = torch.tensor(size, dtype=torch.float32).log().to(self.device)
        return _interpolate(-self.schedule.log_snr(t) / 2, self._tables[key])

    def _conditions(self, cond: Condition, substep: int, start: int, end: int) -> Condition:
        if cond is not None:
            return pytree.tree_map(lambda leaf: leaf[start:end] if isinstance(leaf, Tensor) else leaf, cond)
        size = (end - start,)
        if self.prompts is not None:
            # Drawn on the host, which has to look the prompts up, and would wait for the device otherwise.
            host = Noise(self.config.seed, step=self.steps_done, first_sample=start)
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
        network = self.ema.module if ema else self.generator
        with gathered(network), self._compute_dtype(), frozen(network) as generator:
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

    @torch.no_grad()
    def denoised(self, n: int, cond: Condition = None) -> dict[str, Tensor]:
        """The same n images (n, ...) float32 by the three networks: "generator" is x = g(z), not of the average;
        "teacher" (with its guidance) and "student" are D(alpha x + sigma eps). t lies in the middle of the log-SNR that
        time_distribution draws. All ranks call it.

        Args:
            cond: as for `generate`.
        """
        x = self.generate(n, cond, ema=False)
        cond = self.shown(n)[1] if cond is None else cond
        # The substep is that of no z.
        eps = ops.normal(x.shape, Noise(self.config.seed, device=self.device), stream=Stream.SHOWN, substep=1)
        drawn = self.config.time_distribution
        middle = torch.full((n,), -math.log(drawn.low * drawn.high), device=self.device)
        t = self.schedule.t_from_log_snr(middle).clamp(self.schedule.t_min, self.schedule.t_max)
        x_t = ops.perturb(x, self.schedule.alpha(t), self.schedule.sigma(t), eps=eps, dtype=torch.float32)
        with gathered(self.teacher, self.student), self._compute_dtype():
            return {
                "generator": x,
                "teacher": self.teacher.denoise(x_t, t, cond, self.config.guidance),
                "student": self.student.denoise(x_t, t, cond),
            }

    # Its state --------------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        *,
        background: bool = False,
        then: Callable[[], object] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Writes everything that the run needs to go on into a folder. The teacher is not in it, but where it came from
        (`Denoiser.source`) and its fingerprint. All ranks call it.

        Args:
            background: returns when the state is copied; the next save, or `finish_saving`, waits for the rest.
            then: called on rank 0 when the checkpoint is there.
            notes: plain values to keep with it, the same on every rank; `checkpoint.facts` gives them back.

        Raises:
            CheckpointError: it cannot be written; what stood at `path` before is intact.
        """
        facts = {
            **({} if notes is None else {"notes": notes}),
            "config": to_dict(self.config),
            "step": self.steps_done,
            "seed": self.config.seed,
            "teacher": self._teacher_facts,
            "skipped": self.skipped.item(),
            "ranks": distributed.world_size(),
            "groups": {name: _counters(optimizer) for name, optimizer in self._optimizers().items()},
        }
        tensors = self._tensors()
        for name, optimizer in self._optimizers().items():
            shards = self.shards[name]
            for index, parameter in enumerate(shards.parameters):
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        tensors[f"{name}_optimizer.{shards.names[index]}.{key}"] = shards.like(
                            index, optimizers.plain(value)
                        )
        self._writer.save(path, tensors, facts, background=background, then=then)

    def finish_saving(self) -> None:
        """Waits for a checkpoint that is being written in the background.

        Raises:
            CheckpointError: it could not be written.
        """
        self._writer.wait()

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
        trains: bool = True,
    ) -> EMDTrainer:
        """The trainer that `save` wrote, ready for its next step, on any number of ranks. All ranks call it.

        Args:
            config: replaces the saved one; only what MAY_CHANGE names may differ.
            generator, student: as for the constructor, where they are not copies of the teacher.
            prompts: as for the constructor; they are not in the file.
            trains: False where it will be sampled or exported and no more: of the teacher its architecture counts then.

        Raises:
            CheckpointError: a missing, damaged or foreign folder, another architecture, another configuration, or,
                where it trains, a teacher of other weights than the run began with.
        """
        facts = checkpoint.facts(path)
        try:
            saved = from_dict(EMDConfig, facts["config"])
        except (ConfigError, KeyError) as error:
            raise checkpoint.CheckpointError(
                f"{path} holds a configuration this release cannot read: {error}"
            ) from None
        # A schedule that ends at the last step is another one when the last step moves.
        may_change = MAY_CHANGE - ({"steps"} if saved.lr_schedule != "constant" else set())
        for item in dataclasses.fields(EMDConfig):
            was, now = getattr(saved, item.name), getattr(config or saved, item.name)
            if was != now and item.name not in may_change:
                raise checkpoint.CheckpointError(
                    f"{path} was made with {item.name} = {was!r}, not {now!r}; another run needs another folder"
                )
        trainer = cls(teacher, config or saved, generator, student, prompts)
        trainer._restore(Path(path), facts)  # another architecture is named by its tensors
        if trains:
            trainer._check_teacher(Path(path), facts.get("teacher"))
        return trainer

    def _check_teacher(self, path: Path, saved: dict[str, Any] | None) -> None:
        here = self._teacher_facts
        if saved is not None and saved["sha256"] != here["sha256"]:  # checkpoints of before do not say it
            was, now = (f"{facts['path'] or 'no file'}, SHA-256 {facts['sha256'][:12]}" for facts in (saved, here))
            raise checkpoint.CheckpointError(
                f"{path} was made with a teacher of other weights ({was}) than this one ({now}): "
                "give the one it was made with, or distil into another folder"
            )

    def _restore(self, path: Path, facts: dict[str, Any]) -> None:
        tensors, there = self._tensors(), checkpoint.shapes(path)
        states: dict[str, dict[int, dict[str, Any]]] = {"generator": {}, "student": {}}
        for name, shards in self.shards.items():
            index_of = {parameter: index for index, parameter in enumerate(shards.names)}
            part = f"{name}_optimizer."
            for full in [full for full in there if full.startswith(part)]:
                parameter, _, key = full.removeprefix(part).rpartition(".")
                if parameter not in index_of:
                    raise checkpoint.CheckpointError(f"{path} does not fit this {name}: it has no {parameter}")
                index = index_of[parameter]
                shape, dtype = there[full]
                # Made here, before anything is read: what an optimizer would make at its first step comes too late.
                own = shards.parameters[index]
                value = torch.zeros(shape, dtype=dtype, device=own.device)
                if shape == tuple(shards.whole[index].shape):
                    # In the parameter's memory format: a fused optimizer reads both from first byte to last.
                    value = torch.zeros_like(own, dtype=dtype, requires_grad=False)
                states[name].setdefault(index, {})[key] = value
                tensors[full] = shards.like(index, value)
        checkpoint.restore(path, tensors)
        for name, optimizer in self._optimizers().items():
            for index, state in states[name].items():
                own = self.shards[name].parameters[index]
                for key, value in state.items():
                    state[key] = optimizers.as_kept(optimizer, own, key, value)
            groups = optimizer.state_dict()["param_groups"]
            for group, counters in zip(groups, facts["groups"][name], strict=True):
                group.update(counters)
            optimizer.load_state_dict({"state": states[name], "param_groups": groups})
        self.skipped.fill_(facts["skipped"])
        self.steps_done = facts["step"]

    def _tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by "part.name", as the checkpoint has them."""
        parts = {"generator": self.generator, "student": self.student, "ema": self.ema.module}
        return {
            f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()
        }


def check_health(
    metrics: dict[str, float], config: EMDConfig, culprit: Callable[[], str | None] = lambda: None
) -> None:
    """Looks at one step's metrics, as numbers; `culprit` says which tensor's gradient was not finite.

    Raises:
        Diverged: the run must stop, and why.
    """
    if metrics["skipped"] > config.max_skipped:
        named = culprit()
        raise Diverged(
            f"{metrics['skipped']:.0f} gradients were not finite{f', last that of {named}' if named else ''} "
            f"(max_skipped = {config.max_skipped}); "
            "the weights are those before them. Try smaller learning rates, or a smaller gamma_z"
        )
    if not metrics["z_rms"] <= config.max_z_rms:  # also true for a NaN
        raise Diverged(
            f"the RMS of z is {metrics['z_rms']:.3g} (max_z_rms = {config.max_z_rms:g}): the Langevin chain of z "
            "diverges. Use a smaller gamma_z, or pairs [sigma, value] that make it small where sigma is small"
        )
    if not math.isfinite(metrics["drift_rms"]):
        raise Diverged("drift is not finite: the teacher or the student returned values that are not finite")


def _profile(config: EMDConfig) -> ema.Profile:
    if config.ema_profile == "power":
        return ema.power(config.ema_power)
    if config.ema_profile == "half_life":
        return ema.half_life(config.ema_half_life, config.batch_size)
    return ema.constant(config.ema)


def _counters(optimizer: torch.optim.Optimizer) -> list[dict[str, int]]:
    """What an optimizer counts in its groups (apex: the step) instead of in its tensors."""
    return [{"step": group["step"]} if isinstance(group.get("step"), int) else {} for group in optimizer.param_groups]


def _copy_of(teacher: Denoiser, config: EMDConfig) -> Generator:
    return Generator(trainable(teacher), config.t_star, input_scale=config.input_scale)


def _fuse(*networks: nn.Module, compile: bool) -> None:
    """All or none."""
    done = []
    try:
        for network in networks:
            if compile:
                unfuse(network)  # one that came fused is not compiled yet
            bare = not fusion_report(network).fused
            fuse_known(network, compile=compile)
            if bare:
                done.append(network)
    except ValueError as error:
        for network in done:
            unfuse(network)
        raise ConfigError(f"fuse must be False for this network: {error}") from error


def _interpolate(log_ratio: Tensor, points: Tensor) -> Tensor:
    """exp of what lies at log_ratio between points (n, 2) of logarithms."""
    if len(points) == 1:
        return points[0, 1].exp().expand_as(log_ratio)
    x, y = points.unbind(1)
    log_ratio = log_ratio.clamp(x[0], x[-1])
    after = torch.searchsorted(x.contiguous(), log_ratio).clamp(1, len(x) - 1)
    share = (log_ratio - x[after - 1]) / (x[after] - x[after - 1])
    return torch.lerp(y[after - 1], y[after], share).exp()


def _check_finite(name: str, module: nn.Module) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
            raise ValueError(f"the {name}'s weights are not finite: {key} holds NaN or infinity")


def _check_bare(**networks: nn.Module | None) -> None:
    """Gradients would be reduced twice, and by another rule."""
    for name, network in networks.items():
        modules = network.modules() if isinstance(network, nn.Module) else ()
        if any(isinstance(module, DistributedDataParallel) or distributed.is_fsdp(module) for module in modules):
            raise ValueError(f"the {name} is wrapped in DDP or FSDP2: give it bare, and say config.parallel")


def _check_apart(**networks: nn.Module) -> None:
    """A generator around the teacher itself, instead of a copy, would train the teacher without a word."""
    owner: dict[int, str] = {}
    for name, network in networks.items():
        for parameter in network.parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"{owner[id(parameter)]} and {name} share parameters: give each its own (deepcopy)")


def _shape(name: str, *owners: Any) -> tuple[int, ...]:
    for owner in owners:
        shape = getattr(owner, name, None)
        if shape is not None:
            return tuple(shape)
    raise ValueError(f"give the teacher's Denoiser a {name}, so that the trainer knows what to generate")
