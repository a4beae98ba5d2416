"""The trainer: owns the networks, the optimizers and the average, and makes one optimizer step at a time.

Reading order: `step`, then the three parts that it calls, in the words of docs/algorithm.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emd_fast import distributed, ops
from emd_fast.config import ConfigError, EMDConfig, to_dict
from emd_fast.diffusion.denoiser import Condition, Denoiser, unwrap
from emd_fast.distributed import TrainableParameters, gathered
from emd_fast.em.cuda_graph import GraphedEStep
from emd_fast.em.e_step import sample_eps_z
from emd_fast.em.e_step_xz import sample_x_z
from emd_fast.em.fake_score_step import fake_score_step
from emd_fast.em.frozen import frozen
from emd_fast.em.m_step import WEIGHTINGS, m_step
from emd_fast.em.types import EStep, LangevinSettings, Watch
from emd_fast.noise import Noise, NoiseStream
from emd_fast.train import average as ema
from emd_fast.train import checkpoint, conditions, diagnostics, networks, optimizers
from emd_fast.train.activation_checkpoint import activation_checkpoint
from emd_fast.train.batches import BatchSampler
from emd_fast.train.cast_weights import cast_weights
from emd_fast.train.diagnostics import StepRecord
from emd_fast.train.fingerprint import fingerprint
from emd_fast.train.state import State, check_config, check_teacher, read_facts
from emd_fast.train.throughput import StepTimer


@dataclass(frozen=True)
class _MicroBatch:
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
            bfloat16 leave it as it is and keep a copy of their own with bfloat16 weights (train/cast_weights.py): drop
            yours, or its float32 weights stay.
        config: the distillation.
        generator: callable module (z, cond) -> x; a copy of the teacher at noise level t_star when None.
        fake_score: a Denoiser of the teacher's schedule; a copy of the teacher when None.
        prompts: conditions to draw from where `step` is given none, evenly: a tensor or dict of tensors (N, ...), or a
            table of `emd_fast.train.conditions`. For labels, config.num_classes says as much.

    Raises:
        GroupError: ranks with another configuration or other code; groups that do not make up the ranks.
        ValueError: a teacher with weights that are not finite, without a sample_shape, or without the parameters that
            generator and fake score would start from; two networks that share parameters; fewer samples than ranks;
            networks that somebody else has wrapped in DDP or FSDP2; activation_checkpointing of networks without
            blocks.
    """

    def __init__(
        self,
        teacher: Denoiser,
        config: EMDConfig,
        generator: nn.Module | None = None,
        fake_score: Denoiser | None = None,
        prompts: Any = None,
    ) -> None:
        if not isinstance(config, EMDConfig):
            raise TypeError(f"config must be an EMDConfig, got {type(config).__name__}")
        distributed.check_same(to_dict(config))
        if config.batch_size < distributed.world_size():
            raise ConfigError(
                f"batch_size must be at least the number of ranks, {distributed.world_size()}, got {config.batch_size}"
            )
        self.config = config
        self.generator, self.fake_score = networks.make_trainable(teacher, generator, fake_score, config)
        self.schedule = unwrap(teacher).schedule
        # Of the weights as they were given; the main rank's, which the others take over.
        self._teacher_facts: dict[str, Any] = distributed.on_main(
            lambda: {"path": unwrap(teacher).source, "sha256": fingerprint(unwrap(teacher))}
        )
        self.device = distributed.device_of(self.generator)
        mode, reason = distributed.resolve(config.parallel, sum(p.numel() for p in self.generator.parameters()))
        self.parallel = f"{mode}: {reason}"
        rounds = mode == "replicate" and self.compute_dtype != torch.float32
        self.teacher = cast_weights(teacher, self.compute_dtype) if rounds else teacher
        for network, trains in ((self.teacher, False), (self.generator, True), (self.fake_score, True)):
            network.eval().requires_grad_(trains)  # eval: no dropout, no batch statistics, in any of the three
        self.sample_shape = networks.sample_shape(generator, teacher)
        self.latent_shape = getattr(self.generator, "latent_shape", None) or self.sample_shape
        self.noise = Noise(config.seed, device=self.device)
        if config.fuse:
            networks.fuse_all(self.teacher, self.generator, self.fake_score, compile=config.compile)
        self.ema = ema.EMA(self.generator, ema.profile(config))
        self._spread(mode)
        self.shards = {
            "generator": TrainableParameters(self.generator),
            "fake_score": TrainableParameters(self.fake_score),
        }
        self.generator_optimizer = optimizers.make(config, self.shards["generator"].parameters, config.generator_lr)
        self.fake_score_optimizer = optimizers.make(config, self.shards["fake_score"].parameters, config.fake_score_lr)
        if config.activation_checkpointing:
            networks.check_blocks(generator=self.generator, fake_score=self.fake_score)
        three = (self.generator, self.teacher, self.fake_score)
        self._graphed = (
            GraphedEStep(*three, steps=self._langevin_steps(), guidance=config.guidance, noise=self.noise)
            if config.cuda_graph
            else None
        )
        self.prompts = None if prompts is None else conditions.table(prompts)
        self.batches = BatchSampler(
            config,
            self.schedule,
            self.noise,
            latent_shape=self.latent_shape,
            sample_shape=self.sample_shape,
            prompts=self.prompts,
        )
        self.skipped = torch.zeros((), device=self.device)
        self.steps_done = 0
        self._records: list[StepRecord] = []
        self.timer = StepTimer(self.device)  # of the last step: fake score, e_step, m_step
        self._writer = checkpoint.Writer()
        self._state = State(
            {"generator": self.generator, "fake_score": self.fake_score, "ema": self.ema.module},
            self.shards,
            self._optimizers(),
        )

    def _spread(self, mode: str) -> None:
        """Lays the networks out over the ranks."""
        if distributed.world_size() > 1:
            mesh = distributed.make_mesh(mode, self.device, self.config.shard_group)
            precision = torch.bfloat16 if self.compute_dtype == torch.bfloat16 else None
            for network in (self.teacher, self.generator, self.fake_score, self.ema.module):
                # The average is float32 throughout: it is what a run is for.
                own = None if network is self.ema.module else precision
                distributed.shard(network, mode, precision=own, mesh=mesh, device=self.device)

    # One step ---------------------------------------------------------------------------------------------------------

    def step(self, cond: Condition = None) -> dict[str, Tensor]:
        """Fake-score updates, E-step, M-step. `cond` (batched, batch_size: that of all ranks) is drawn where the
        configuration has classes.

        Returns:
            Device scalars, the same on every rank: generator_loss, fake_score_loss, drift_rms, z_rms,
            generator_grad_norm, fake_score_grad_norm and skipped, the number of updates so far that were left out
            because their gradient was not finite.
        """
        self._records = []  # that of the step before: its memory is needed now
        self.timer.start()
        fake_score = self.update_fake_score(cond)
        self.timer.end("fake_score")
        with gathered(self.generator):
            sampled = self._e_steps(cond)
            self.timer.end("e_step")
            generator_loss = self._generator_loss(sampled)
        generator_norm = self._update("generator")
        self.ema.update(self.generator, self.steps_done)
        self.timer.end("m_step")
        self.steps_done += 1
        means = torch.stack(
            [
                generator_loss,
                torch.stack([loss for loss, _ in fake_score]).mean(),
                self._mean_square(s.drift for s in sampled),
                self._mean_square(s.z for s in sampled),
            ]
        )
        if distributed.world_size() > 1:
            dist.all_reduce(means)
        return {
            "generator_loss": means[0],
            "fake_score_loss": means[1],
            "drift_rms": means[2].sqrt(),
            "z_rms": means[3].sqrt(),
            "generator_grad_norm": generator_norm,
            "fake_score_grad_norm": torch.stack([norm for _, norm in fake_score]).mean(),
            "skipped": self.skipped.clone(),
        }

    def diagnostics(self) -> dict[str, Tensor]:
        """What diagnostics.py says about the last step: device scalars, the same on every rank. All ranks call it,
        on the steps that are logged; the training does not notice.

        Raises:
            RuntimeError: no step was made.
        """
        records = self._last_records()
        return diagnostics.diagnose(
            records,
            (self.batches.e_step(record.first_sample, len(record.posterior.t)) for record in records),
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

            def loss_of(record: StepRecord, cancels: bool = target == "drift") -> Tensor:
                loss = m_step(self.generator, record.posterior, record.weight, noise_cancellation=cancels)
                return loss * diagnostics.contrast(record.first_sample, len(loss), self.config.batch_size, loss.device)

            with gathered(self.generator):
                self._accumulate("generator", self._last_records(), loss_of)
            shards.reduce_gradients()
            found[f"generator_grad_var_{target}"] = shards.gradient_norms().square().sum()
            shards.clear_gradients()
        return found

    def _last_records(self) -> list[StepRecord]:
        if not self._records:
            raise RuntimeError("diagnostics are those of a step: call step() first")
        return self._records

    def update_fake_score(self, cond: Condition = None) -> list[tuple[Tensor, Tensor]]:
        """The first part of a step, alone: the fake score's updates, after its warm-up where this is the first step.

        Returns:
            For each update but those of the warm-up: the loss of this rank's samples, the norm of the whole gradient.
        """
        config = self.config
        self.batches.at(self.steps_done)
        self._set_learning_rates()
        if self.steps_done == 0:
            for j in range(config.fake_score_warmup):
                self._fake_score_update(cond, config.fake_score_updates + j)
        return [self._fake_score_update(cond, j) for j in range(config.fake_score_updates)]

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
            self.batches.at(step)
        if samples is None:
            samples = range(*distributed.share(self.config.batch_size))
        return self._e_step(self._micro_batch(cond, 0, samples.start, samples.stop), watch)

    def _e_steps(self, cond: Condition) -> list[EStep]:
        # Gathers every network once for all Langevin steps of all micro-batches, and frees two of the three before the
        # M-step needs memory for its activations.
        with gathered(self.generator, self.teacher, self.fake_score):
            return [self._e_step(batch) for batch in self._micro_batches(cond, 0)]

    def _e_step(self, batch: _MicroBatch, watch: Watch | None = None) -> EStep:
        config = self.config
        z, eps = self.batches.e_step(batch.first, batch.size)
        t = self.batches.times(config.time_distribution, batch.size, stream=NoiseStream.E_STEP_TIME)
        vsd = config.objective == "vsd"
        gamma_eps = self.batches.step_size(config.gamma_eps, t)
        gamma_z = 0.0 if vsd else self.batches.step_size(config.gamma_z, t)
        with self._compute_dtype():
            if self._graphed is not None and watch is None:
                return self._graphed(z, eps, t, batch.cond, gamma_eps=gamma_eps, gamma_z=gamma_z)
            sample = sample_x_z if config.sampling == "x_z" else sample_eps_z
            settings = LangevinSettings(self._langevin_steps(), gamma_eps, gamma_z, self.noise, config.guidance)
            networks = (self.generator, self.teacher, self.fake_score)
            return sample(networks, z, eps, t, batch.cond, settings, watch)

    def _langevin_steps(self) -> int:
        return 1 if self.config.objective == "vsd" else self.config.langevin_steps

    def _generator_loss(self, sampled: Sequence[EStep]) -> Tensor:
        """This rank's part of the M-step's loss; leaves its gradient, and what `diagnostics` looks at."""

        first, _ = distributed.share(self.config.batch_size)

        def loss_of(posterior: EStep) -> Tensor:
            weight = WEIGHTINGS[self.config.weighting](posterior.alpha, posterior.sigma)
            if self.config.objective == "vsd":
                # The gradient is linear in drift, and drift is gamma_eps times that of score distillation.
                weight = weight / self.batches.step_size(self.config.gamma_eps, posterior.t)

            def watched(z: Tensor, cond: Condition) -> Tensor:
                generated = self.generator(z, cond)
                before = sum(len(record.posterior.t) for record in self._records)
                self._records.append(StepRecord(posterior, first + before, generated.detach(), weight))
                return generated

            return m_step(watched, posterior, weight, noise_cancellation=self.config.noise_cancellation)

        return self._accumulate("generator", sampled, loss_of)

    def _fake_score_update(self, cond: Condition, substep: int) -> tuple[Tensor, Tensor]:
        def loss_of(batch: _MicroBatch) -> Tensor:
            z, eps = self.batches.fake_score(batch.first, batch.size, substep)
            times = self.config.fake_score_time_distribution
            t = self.batches.times(times, batch.size, stream=NoiseStream.FAKE_SCORE_TIME, substep=substep)
            return fake_score_step(self.generator, self.fake_score, z, eps, t, cond=batch.cond)

        with gathered(self.generator, self.fake_score):
            loss = self._accumulate("fake_score", self._micro_batches(cond, 1 + substep), loss_of)
        return loss, self._update("fake_score")

    # Its parts, over micro-batches and ranks --------------------------------------------------------------------------

    def _micro_batches(self, cond: Condition, substep: int) -> list[_MicroBatch]:
        """This rank's samples by micro-batches."""
        first, last = distributed.share(self.config.batch_size)
        size = self.config.micro_batch_size or last - first
        return [self._micro_batch(cond, substep, start, min(start + size, last)) for start in range(first, last, size)]

    def _micro_batch(self, cond: Condition, substep: int, start: int, end: int) -> _MicroBatch:
        return _MicroBatch(start, end - start, self.batches.conditions(cond, start, end, substep))

    def _accumulate(self, name: str, batches: Sequence[Any], loss_of: Callable[[Any], Tensor]) -> Tensor:
        """The sum of the losses over this rank's samples, divided by the global batch; leaves its gradient."""
        shards = self.shards[name]
        shards.clear_gradients()
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, 1):
            distributed.sync_gradients(shards.network, number == len(batches))
            checkpointing = (
                activation_checkpoint(shards.network)
                if self.config.activation_checkpointing
                else contextlib.nullcontext()
            )
            with self._compute_dtype(), checkpointing:
                loss = loss_of(batch).sum() / self.config.batch_size
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
        return {"generator": self.generator_optimizer, "fake_score": self.fake_score_optimizer}

    def _set_learning_rates(self) -> None:
        scale = optimizers.rate_scale(self.config, self.steps_done)
        rates = {"generator": self.config.generator_lr, "fake_score": self.config.fake_score_lr}
        for name, optimizer in self._optimizers().items():
            optimizers.set_rate(optimizer, rates[name] * scale)

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
        z = ops.normal((n, *self.latent_shape), noise, stream=NoiseStream.SHOWN)
        which = range(first_sample, first_sample + n)
        if self.prompts is not None:
            return z, self.batches.looked_up(torch.tensor(which, dtype=torch.int64) % len(self.prompts))
        if self.config.num_classes:
            return z, torch.tensor(which, dtype=torch.int64, device=self.device) % self.config.num_classes
        return z, None

    @torch.no_grad()
    def denoised(self, n: int, cond: Condition = None) -> dict[str, Tensor]:
        """The same n images (n, ...) float32 by the three networks: "generator" is x = g(z), not of the average;
        "teacher" (with its guidance) and "fake_score" are D(alpha x + sigma eps). t lies in the middle of the log-SNR
        that time_distribution draws. All ranks call it.

        Args:
            cond: as for `generate`.
        """
        x = self.generate(n, cond, ema=False)
        cond = self.shown(n)[1] if cond is None else cond
        # The substep is that of no z.
        eps = ops.normal(x.shape, Noise(self.config.seed, device=self.device), stream=NoiseStream.SHOWN, substep=1)
        drawn = self.config.time_distribution
        middle = torch.full((n,), -math.log(drawn.low * drawn.high), device=self.device)
        t = self.schedule.t_from_log_snr(middle).clamp(self.schedule.t_min, self.schedule.t_max)
        x_t = ops.perturb(x, self.schedule.alpha(t), self.schedule.sigma(t), eps=eps, dtype=torch.float32)
        with gathered(self.teacher, self.fake_score), self._compute_dtype():
            return {
                "generator": x,
                "teacher": self.teacher.denoise(x_t, t, cond, self.config.guidance),
                "fake_score": self.fake_score.denoise(x_t, t, cond),
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
            "groups": self._state.counters(),
        }
        self._writer.save(path, self._state.tensors(), facts, background=background, then=then)

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
        fake_score: Denoiser | None = None,
        prompts: Any = None,
        trains: bool = True,
    ) -> EMDTrainer:
        """The trainer that `save` wrote, ready for its next step, on any number of ranks. All ranks call it.

        Args:
            config: replaces the saved one; only what RESUMABLE names may differ.
            generator, fake_score: as for the constructor, where they are not copies of the teacher.
            prompts: as for the constructor; they are not in the file.
            trains: False where it will be sampled or exported and no more: of the teacher its architecture counts then.

        Raises:
            CheckpointError: a missing, damaged or foreign folder, another architecture, another configuration, or,
                where it trains, a teacher of other weights than the run began with.
        """
        saved = read_facts(path, checkpoint.facts(path))
        check_config(path, saved.config, config or saved.config)
        trainer = cls(teacher, config or saved.config, generator, fake_score, prompts)
        trainer._state.restore(Path(path), saved.counters)  # another architecture is named by its tensors
        trainer.skipped.fill_(saved.skipped)
        trainer.steps_done = saved.step
        if trains:
            check_teacher(path, saved.teacher, trainer._teacher_facts)
        return trainer
