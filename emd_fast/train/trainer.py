"""The trainer: holds the networks, the optimizers and the average, and makes optimizer steps.

Reading order: `step`, then the three parts that it calls, in the words of docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emd_fast import distributed
from emd_fast.config import EMDConfig, flatten, to_dict
from emd_fast.diffusion.denoiser import Condition, Denoiser, unwrap
from emd_fast.distributed import gathered
from emd_fast.em.fake_score_step import fake_score_step
from emd_fast.em.frozen import frozen
from emd_fast.em.m_step import m_step, weight_of
from emd_fast.em.types import EStep, Watch
from emd_fast.noise import Noise, NoiseStream
from emd_fast.train import checkpoint, conditions, diagnostics, networks, precision
from emd_fast.train.batches import BatchSampler, MicroBatch
from emd_fast.train.diagnostics import StepRecord
from emd_fast.train.gradient_variance import gradient_variance
from emd_fast.train.learner import Learner
from emd_fast.train.posterior import PosteriorSampler
from emd_fast.train.rungs import Rollout, generated
from emd_fast.train.state import State, check_config, check_process, check_sizes, check_teacher, read_facts
from emd_fast.train.throughput import StepTimer
from emd_fast.train.times import with_shift


class EMDTrainer:
    """Distils a teacher into a generator of one or several calls.

        trainer = EMDTrainer(teacher, EMDConfig(steps=300, num_classes=10))
        while trainer.steps_done < trainer.config.steps:
            metrics = trainer.step()

    Under a process group (`emd_fast.distributed.process_group`) every rank builds the same trainer
    and makes the same calls. The networks are spread over the ranks as `config.parallelism` says, and
    each rank takes its share of the batch. Networks that are too large for one process may be on the
    meta device on all ranks but the first.

    Args:
        teacher: a Denoiser; its weights never change. It is set to eval mode and to require no
            gradients, fused if compute.fuse is set, and sharded if parallelism says so.
            Replicas and single processes that compute in bfloat16, or on a quantised base, leave it as
            it is and keep a copy with rounded weights: delete yours to free its float32 weights.
        config: configuration of the distillation.
        generator: callable module (z, cond) -> x; a copy of the teacher at noise level t_star when None.
        fake_score: a Denoiser of the teacher's schedule; a copy of the teacher when None.
            With config.adapter, given networks may have layers of peft (docs/distributed.md).
        prompts: conditions to draw from, evenly, when `step` is given none: a tensor or dict of
            tensors (N, ...), or a table of `emd_fast.train.conditions`. For labels, set
            config.num_classes instead.

    Raises:
        GroupError: ranks with different configurations or code; groups that do not divide the ranks.
        ValueError: a teacher with weights that are not finite, or without a sample_shape; no parameters to
            start from; networks that share parameters; fewer samples than ranks; networks already
            wrapped in DDP or FSDP2; activation_checkpointing of networks without blocks.
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
        self.config = config = with_shift(config, unwrap(teacher))
        distributed.check_same(flatten(config))
        prepared = networks.prepare(teacher, config, generator, fake_score)
        self.generator, self.teacher, self.fake_score = three = prepared.three
        self.ema, self.parallel = prepared.ema, prepared.parallel
        self.device, self.compute_dtype = prepared.device, prepared.compute_dtype
        self.latent_shape, self.sample_shape = prepared.shapes[0]  # of the first size
        self.teacher_facts = prepared.teacher_facts  # origin and fingerprint of the teacher as passed in
        self.schedule = unwrap(teacher).schedule
        self.noise = Noise(config.seed, device=self.device)
        rates = {"generator": config.optimizer.generator_lr, "fake_score": config.optimizer.fake_score_lr}
        where = self.compute_dtype, config, self.device
        self.learners = {name: Learner(getattr(self, name), lr, *where) for name, lr in rates.items()}
        self.prompts = None if prompts is None else conditions.table(prompts)
        inner = unwrap(self.teacher)
        self.batches = BatchSampler(config, self.noise, prepared.shapes, self.prompts, inner, self.compute_dtype)
        self.rollout = Rollout(self.generator, self.batches)
        self.posterior = PosteriorSampler(config, three, self.noise, self.batches, self.device.type)
        self.steps_done, self.skipped = 0, torch.zeros((), device=self.device)
        self.timer = StepTimer(self.device)  # seconds of the last step: fake score, e_step, m_step
        self._records: list[StepRecord] = []
        self._writer = checkpoint.Writer()
        parts = {"generator": self.generator, "fake_score": self.fake_score, "ema": self.ema.module}
        self._state = State(parts, self.learners, prepared.own)

    # One step ---------------------------------------------------------------------------------------------------------

    def step(self, cond: Condition = None) -> dict[str, Tensor]:
        """Makes one step: fake-score updates, E-step, M-step.

        Args:
            cond: conditions of the global batch (batch_size, ...), the same on every rank. Drawn
                from the prompts or classes when None.

        Returns:
            Device scalars, the same on every rank: generator_loss, fake_score_loss, drift_rms, z_rms,
            generator_grad_norm, fake_score_grad_norm; generator_clipped and fake_score_clipped, the
            share of the updates so far whose gradient was clipped; skipped, the number of updates so
            far that were skipped because their gradient was not finite.
        """
        self._records = []  # frees the memory of the step before
        self.timer.start()
        fake_score = self.update_fake_score(cond)
        self.timer.end("fake_score")
        with gathered(self.generator):
            posteriors = self._e_steps(cond)
            self.timer.end("e_step")
            generator_loss = self._generator_loss(posteriors)
        generator_norm = self._update("generator")
        self.ema.update(self.generator, self.steps_done)
        self.timer.end("m_step")
        self.steps_done += 1
        drift, z = (diagnostics.mean_square(posteriors, name, self.config.batch_size) for name in ("drift", "z"))
        means = torch.stack([generator_loss, torch.stack([loss for loss, _ in fake_score]).mean(), drift, z])
        if distributed.world_size() > 1:
            dist.all_reduce(means)
        return {
            "generator_loss": means[0],
            "fake_score_loss": means[1],
            "drift_rms": means[2].sqrt(),
            "z_rms": means[3].sqrt(),
            "generator_grad_norm": generator_norm,
            "fake_score_grad_norm": torch.stack([norm for _, norm in fake_score]).mean(),
            **{f"{name}_clipped": learner.clipping.share() for name, learner in self.learners.items()},
            "skipped": self.skipped.clone(),
        }

    def update_fake_score(self, cond: Condition = None) -> list[tuple[Tensor, Tensor]]:
        """Makes the fake score's updates of a step; before those of step 0, its warm-up.

        Returns:
            (loss of this rank's samples, norm of the whole gradient) of each update except the warm-up.
        """
        self.batches.at(self.steps_done)
        for learner in self.learners.values():
            learner.schedule(self.steps_done)
        if self.steps_done == 0:
            for j in range(self.config.fake_score_warmup):
                self._fake_score_update(cond, self.config.fake_score_updates + j)
        return [self._fake_score_update(cond, j) for j in range(self.config.fake_score_updates)]

    def sample_posterior(
        self,
        cond: Condition = None,
        *,
        step: int | None = None,
        samples: range | None = None,
        watch: Watch | None = None,
    ) -> EStep:
        """Makes an E-step with the current weights.

        Args:
            cond: as for `step`.
            step: the optimizer step whose noise is used; the current one when None.
            samples: samples of the global batch; the share of this rank when None.
            watch: called after each Langevin step.
        """
        if step is not None:
            self.batches.at(step)
        samples = range(*distributed.share(self.config.batch_size)) if samples is None else samples
        return self._e_step(self.batches.micro_batch(cond, 0, samples), watch).bare()

    def _fake_score_update(self, cond: Condition, substep: int) -> tuple[Tensor, Tensor]:
        def losses(batch: MicroBatch) -> Tensor:
            z, eps = self.batches.fake_score(batch.first, batch.size, substep)
            times = self.config.fake_score_time_distribution
            t = self.batches.times(times, batch.size, stream=NoiseStream.FAKE_SCORE_TIME, substep=substep)
            cond = self.rollout(batch, 1 + substep).cond
            return fake_score_step(self.generator, self.fake_score, z, eps, t, cond=cond)

        with gathered(self.generator, self.fake_score):
            micro_batches = self.batches.micro_batches(cond, 1 + substep)
            loss = self.learners["fake_score"].accumulate(micro_batches, losses)
        return loss, self._update("fake_score")

    def _e_steps(self, cond: Condition) -> list[EStep]:
        # Gathers each network once for all micro-batches, and frees two before the M-step's activations.
        with gathered(self.generator, self.teacher, self.fake_score):
            return [self._e_step(batch) for batch in self.batches.micro_batches(cond, 0)]

    def _e_step(self, batch: MicroBatch, watch: Watch | None = None) -> EStep:
        with self.autocast():
            return self.posterior(self.rollout(batch, 0), watch)

    def _generator_loss(self, posteriors: Sequence[EStep]) -> Tensor:
        """Returns this rank's part of the M-step's loss; leaves the gradient and the step's records."""
        first, _ = distributed.share(self.config.batch_size)

        def losses(posterior: EStep) -> Tensor:
            weight = weight_of(self.config.weighting, posterior)
            if self.config.objective == "vsd":
                # The gradient is linear in drift, and drift is gamma_eps times that of score distillation.
                weight = weight / self.batches.step_size(self.config.gamma_eps, posterior.t)

            def recorded(z: Tensor, cond: Condition) -> Tensor:
                generated = posterior.generated if posterior.generated is not None else self.generator(z, cond)
                before = sum(len(record.posterior.t) for record in self._records)
                self._records.append(StepRecord(posterior.bare(), first + before, generated.detach(), weight))
                return generated

            return m_step(recorded, posterior, weight, noise_cancellation=self.config.noise_cancellation)

        return self.learners["generator"].accumulate(posteriors, losses)

    def _update(self, name: str) -> Tensor:
        norm = self.learners[name].update()
        self.skipped += (~torch.isfinite(norm)).float()
        return norm

    def autocast(self) -> torch.autocast:
        """Context manager for passes of the networks in the compute dtype."""
        return precision.autocast(self.compute_dtype, self.device)

    # Diagnostics ------------------------------------------------------------------------------------------------------

    def diagnostics(self) -> dict[str, Tensor]:
        """Returns the diagnostics of the last step (`diagnostics.diagnose`). All ranks call it."""
        return diagnostics.diagnose(self._records, self.batches)

    def gradient_variance(self) -> dict[str, Tensor]:
        """Returns the gradient's variance at the last step (`gradient_variance`). All ranks call it."""
        return gradient_variance(self.learners["generator"], self._records, self.config)

    # Samples ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        n: int,
        cond: Condition = None,
        ema: bool = True,
        *,
        first_sample: int = 0,
        calls: int | None = None,
        shape: Sequence[int] | None = None,
    ) -> Tensor:
        """Returns n samples (n, ...) float32 of the generator. The same seed gives the same samples.

        Args:
            cond: batched conditions; the prompts or classes in turn (0, 1, 2, ...) when None.
            ema: use the average of the weights.
            first_sample: index of the first sample in the noise stream of shown samples.
            calls: stop after that many rungs; all when None.
            shape: of one sample; that of the first size when None.

        Raises:
            ValueError: more calls than rungs; another shape for a generator that makes one.
        """
        z, cond = self.batches.shown(n, first_sample, cond, shape)
        network = self.ema.module if ema else self.generator
        # PyTorch rounds some matmuls otherwise for weights that require a gradient, and exports must agree.
        with gathered(network), self.autocast(), frozen(network) as generator:
            return generated(generator, self.batches, z, cond, first_sample, calls).float()

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        *,
        background: bool = False,
        then: Callable[[], object] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint folder from which `resume` continues the run. All ranks call it.

        The teacher's weights are not in it, only its origin (`Denoiser.source`) and its fingerprint.

        Args:
            background: return once the state is copied; the next save, or `finish_saving`, waits for
                the write.
            then: called on rank 0 when the checkpoint is complete.
            notes: plain values to keep with it, the same on every rank; `checkpoint.facts` returns them.

        Raises:
            CheckpointError: the folder cannot be written; a checkpoint that was at `path` is intact.
        """
        facts = {
            **({} if notes is None else {"notes": notes}),
            "config": to_dict(self.config),
            "step": self.steps_done,
            "seed": self.config.seed,
            "teacher": self.teacher_facts,
            "skipped": self.skipped.item(),
            "ranks": distributed.world_size(),
            "groups": self._state.counters(),
            "clipped": self._state.clipped(),
        }
        self._writer.save(path, self._state.tensors(), facts, background=background, then=then)

    def finish_saving(self) -> None:
        """Waits for a checkpoint that is written in the background; raises its CheckpointError."""
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
        """Restores a trainer from a checkpoint, on any number of ranks. All ranks call it.

        Args:
            config: replaces the saved one; only keys that may change at a resume may differ.
            generator, fake_score, prompts: as for the constructor; a checkpoint does not hold prompts.
            trains: False for sampling and export, for which another teacher of the architecture is enough.

        Raises:
            CheckpointError: a missing, damaged or foreign folder; another architecture, configuration
                or noise schedule; a teacher of other weights than the run began with, if `trains`.
            CheckpointGone: the folder was removed or replaced meanwhile.
        """
        with checkpoint.reading(path):
            saved = read_facts(path, checkpoint.facts(path))
            check_sizes(path, saved, unwrap(teacher), trains)
            check_config(path, saved.config, with_shift(config or saved.config, unwrap(teacher)))
            trainer = cls(teacher, config or saved.config, generator, fake_score, prompts)
            trainer._state.restore(Path(path), saved)
            trainer.skipped.fill_(saved.skipped)
            trainer.steps_done = saved.step
            check_process(path, saved.teacher, trainer.teacher_facts)
            if trains or trainer._state.own:  # an adapter is of no use with another base
                check_teacher(path, saved.teacher, trainer.teacher_facts)
        return trainer
