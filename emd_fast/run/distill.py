"""A run from start to end: teacher, distillation, evaluation, report.

Repeating the command on the same folder resumes the run; on a finished run it only says so. Inside
a process group all ranks call the same functions, and the main rank writes and prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from emd_fast import distributed
from emd_fast.config import RunConfig, flatten
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.reporting import journal, report
from emd_fast.reporting.progress import Progress, say
from emd_fast.run.best import best_of_run
from emd_fast.run.folder import RunError, finished_metrics, open_folder, settings_of, write_metrics
from emd_fast.run.loop import train
from emd_fast.run.plan import UNKNOWN, Ceilings, Plan, plan
from emd_fast.run.signals import Interrupted, end_on_signals, stop_on_signals
from emd_fast.run.work import Work
from emd_fast.run.writes import FolderWrites
from emd_fast.tasks import Task, task_of
from emd_fast.train import checkpoint, optimizers, quantised_base, run_checkpoints, rungs
from emd_fast.train.checkpoint import CheckpointError, CheckpointGone
from emd_fast.train.memory import available
from emd_fast.train.parameter_counts import ParameterCounts
from emd_fast.train.precision import compute_dtype
from emd_fast.train.trainer import EMDTrainer

T = TypeVar("T")

_TRIES = 20  # reads of a checkpoint while a run in training removes it


def distill(settings: RunConfig, folder: Path, sinks: tuple[str, ...] = ()) -> dict[str, Any]:
    """Makes a whole run. Returns the content of metrics.json.

    Args:
        settings: configuration of the run.
        folder: the run folder; created if needed, resumed where it holds the same run.
        sinks: further logs, "tensorboard" and "wandb".

    Raises:
        GroupError: the ranks have different settings.
        RunError: the folder cannot be written, holds another run or is in use.
        CheckpointError: no checkpoint can be read.
        Diverged: training was stopped; report.md says why.
        Interrupted: a signal ended the run; its progress is saved.
        RunStopped: the folder was moved, removed or cannot be written any more; what can be saved is.
    """
    with end_on_signals(), contextlib.ExitStack() as held:
        return _distill(settings, folder, sinks, held)


def _distill(settings: RunConfig, folder: Path, sinks: tuple[str, ...], held: contextlib.ExitStack) -> dict[str, Any]:
    distributed.check_same({"the run folder": str(folder), **flatten(settings)})
    # A missing package is reported before a teacher is trained.
    distributed.on_main(lambda: journal.check(sinks))
    optimizers.make(settings.emd.optimizer, [torch.nn.Parameter(torch.zeros(1))], 1.0)
    if settings.emd.adapter.base_dtype != "auto":
        quantised_base.quantiser(settings.emd.adapter.base_dtype)
    distributed.on_main(lambda: open_folder(folder, settings, held))
    metrics = finished_metrics(folder, settings)
    if metrics is not None:
        say(f"{folder} is finished: {settings.emd.steps} steps, report in {folder / 'report.md'}")
        return metrics
    writes = FolderWrites(folder, held)
    task = task_of(settings)
    room = available(task.device)
    needs = plan_of(settings, room=room if task.device.type == "cuda" else None)
    if distributed.world_size() > 1:
        say(needs.table())
    needs.check(room)
    task.open_references()
    teacher, seconds = teacher_of(task, folder)
    writes.check()
    if paths := _found(folder):
        trainer = _last_readable(paths, settings, task, teacher)
    else:
        trainer = EMDTrainer(teacher, settings.emd, *task.make_networks(), prompts=task.prompts)
    del teacher  # frees its float32 weights where the trainer has a bf16 copy
    if distributed.world_size() > 1:
        say(f"{distributed.world_size()} ranks, {trainer.parallel}")
    if settings.emd.compute.cuda_graph == "auto":
        say(trainer.posterior.why)
    if trainer.steps_done:
        say(f"resuming {folder} at step {trainer.steps_done} of {settings.emd.steps}")
    seconds["distil"] = train(trainer, settings, folder, sinks, task, writes)
    writes.check()
    try:
        metrics = evaluate(settings, folder, task, trainer, seconds, writes.check)
    except (FileNotFoundError, distributed.FailedOnMain):
        writes.check()  # says whether the folder was moved
        raise
    writes.check()  # what was written may be in another folder by now
    return metrics


def plan_of(settings: RunConfig, devices: int = 0, ceilings: Ceilings = UNKNOWN, room: float | None = None) -> Plan:
    """Plans memory and traffic of a run on each device, and a lower bound on a step's time.

    Args:
        devices: number of devices; that of the process group when 0.
        ceilings: peak rates of the hardware, which the times follow from.
        room: bytes of memory of a device, by which gather = "auto" is decided; None if not known.

    Raises:
        ConfigError: fewer samples than devices, or rungs that do not fit the teacher.
        GroupError: shard groups that do not make up the devices.
    """
    task = task_of(settings)
    with torch.device("meta"):  # a network too large for this machine must not be allocated here
        generator, fake_score = task.make_networks()
    teacher = task.untrained_teacher()
    if generator is None:
        generator = rungs.start(teacher, settings.emd)
    else:
        rungs.check_given(generator, settings.emd)
    networks = teacher, generator, fake_score or teacher
    work = Work.of(*networks, settings.emd.num_classes) if ceilings.operations is not None else None
    return plan(
        ParameterCounts.of(*networks, settings.emd.adapter),
        settings.emd,
        devices=devices,
        reduced=compute_dtype(settings.emd.compute.precision, task.device) == torch.bfloat16,
        work=work,
        ceilings=ceilings,
        available=room,
    )


def open_run(
    folder: Path,
    up_to: int | None = None,
    *,
    best: bool = False,
    settings: RunConfig | None = None,
    trains: bool = False,
) -> tuple[RunConfig, Task, EMDTrainer]:
    """Opens a run at its last checkpoint, or at another one.

    Args:
        folder: the run folder.
        up_to: opens the last checkpoint of at most this many steps.
        best: opens the best checkpoint instead.
        settings: replaces those in the folder; only the evaluation may differ.
        trains: as for EMDTrainer.resume.

    Raises:
        RunError: the folder holds no run, or no such checkpoint.
        CheckpointError: no such checkpoint can be read.
    """
    settings = settings or settings_of(folder)
    if best:
        path = run_checkpoints.best_of(folder / "checkpoints")
        if not distributed.on_main(lambda: run_checkpoints.exists(path)):
            raise RunError(f"{folder} has no best checkpoint: distil with --evaluation.every IMAGES to keep one")
        _retried(lambda: checkpoint.facts(path))  # raises for a damaged file before the teacher is loaded
        task = task_of(settings)
        teacher, _ = teacher_of(task, folder)
        return settings, task, _retried(lambda: _resumed(path, settings, task, teacher, trains))
    _listed(folder, up_to)  # raises before the teacher is loaded
    task = task_of(settings)
    teacher, _ = teacher_of(task, folder)
    trainer = _retried(lambda: _last_readable(_listed(folder, up_to), settings, task, teacher, trains))
    return settings, task, trainer


def _listed(folder: Path, up_to: int | None) -> list[Path]:
    """The checkpoints of a run, of at most `up_to` steps, as rank 0 finds them.

    Raises:
        RunError: there is none.
    """
    paths = _found(folder)
    if not paths:
        raise RunError(f"{folder} has no checkpoint yet: run `emd-fast distill` on it first")
    if up_to is not None and run_checkpoints.step_of(paths[0]) > up_to:
        steps = ", ".join(str(run_checkpoints.step_of(path)) for path in paths)
        raise RunError(f"{folder} has no checkpoint at or before step {up_to}: it has those of step {steps}")
    return [path for path in paths if up_to is None or run_checkpoints.step_of(path) <= up_to]


def _found(folder: Path) -> list[Path]:
    return distributed.on_main(lambda: run_checkpoints.found(folder / "checkpoints"))


def _retried(read: Callable[[], T]) -> T:
    """Calls `read` again where a run in training has removed the checkpoint that it was reading."""
    for _ in range(_TRIES - 1):
        with contextlib.suppress(CheckpointGone):
            return read()
    return read()


def evaluate(
    settings: RunConfig,
    folder: Path,
    task: Task,
    trainer: EMDTrainer,
    seconds: dict[str, float],
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Evaluates a run and writes samples/, metrics.json and report.md. Returns the metrics.

    All ranks call it and compute; the main rank writes.

    Args:
        trainer: its generator is evaluated, and its state stays unchanged.
        seconds: time of the phases so far, by name.
        check: called before metrics and report are written; raises if the folder was moved meanwhile.
    """
    say("evaluating")
    began = time.monotonic()
    teacher = trainer.teacher
    if distributed.is_sharded(teacher):  # a sharded network cannot be copied
        teacher, _ = teacher_of(task, folder)
    untrained = EMDTrainer(teacher, trainer.config, *task.make_networks(), prompts=task.prompts)
    with distributed.gathered(trainer.teacher):
        metrics = task.evaluate(trainer, untrained, folder)
    seconds = {**seconds, "evaluate": time.monotonic() - began}
    metrics = {**metrics, "steps": trainer.steps_done, "seconds": {k: round(v, 2) for k, v in seconds.items()}}
    if kept := best_of_run(folder):
        metrics["best"] = kept
    trained = max(
        map(run_checkpoints.step_of, run_checkpoints.found(folder / "checkpoints")), default=trainer.steps_done
    )
    if trained > trainer.steps_done:
        metrics["trained"] = trained  # an earlier checkpoint was evaluated

    def write() -> None:
        (folder / "report.md").unlink(missing_ok=True)  # without a report the run is unfinished
        write_metrics(folder, metrics)
        report.write(folder)

    check()
    distributed.on_main(write)
    return metrics


def teacher_of(task: Task, folder: Path) -> tuple[Denoiser, dict[str, float]]:
    """Loads or trains the teacher. Returns it, and the seconds that it took."""
    progress: Progress | None = None
    made: list[Denoiser] = []
    began = time.monotonic()
    with stop_on_signals() as stopped:

        def on_step(step: int, total: int, loss: Any, name: str = "teacher", kept: bool = False) -> None:
            nonlocal progress
            progress = progress or Progress(name, total, step - 1)
            progress.update(step)
            if stopped():
                say(f"stopped: the next run {'goes on from here' if kept else 'trains the teacher from the start'}")
                raise _Stop

        def make() -> int:
            with contextlib.suppress(_Stop):
                made.append(task.make_teacher(folder, on_step))
            return stopped()

        # The main rank trains the teacher if needed; the others read the file that it wrote.
        stop = distributed.on_main(make)
    if stop:  # the signal may have reached rank 0 only
        raise Interrupted(stop)
    teacher = made[0] if distributed.is_main() else task.make_teacher(folder, None)
    if progress is not None:
        progress.close()
    return teacher, {"teacher": time.monotonic() - began}


class _Stop(Exception):
    """Ends the training of a teacher."""


def _last_readable(
    paths: list[Path], settings: RunConfig, task: Task, teacher: Denoiser, trains: bool = True
) -> EMDTrainer:
    """The trainer of the last of these checkpoints that can be read.

    Raises:
        CheckpointGone: a checkpoint was removed meanwhile, so there may be later ones.
        CheckpointError: none can be read.
    """
    for path in reversed(paths):
        try:
            checkpoint.facts(path)
        except CheckpointGone:
            raise
        except CheckpointError as error:
            say(f"skipped: {error}")
            continue
        return _resumed(path, settings, task, teacher, trains)
    raise CheckpointError(f"none of the checkpoints in {paths[0].parent} can be read; delete them to start over")


def _resumed(path: Path, settings: RunConfig, task: Task, teacher: Denoiser, trains: bool) -> EMDTrainer:
    generator, fake_score = task.make_networks()
    return EMDTrainer.resume(
        path,
        teacher,
        config=settings.emd,
        generator=generator,
        fake_score=fake_score,
        prompts=task.prompts,
        trains=trains,
    )


def shortened(settings: RunConfig) -> RunConfig:
    """The same run with a tenth of all steps, to see that it works rather than how well."""

    def tenth(steps: int) -> int:
        return max(1, steps // 10)

    emd = dataclasses.replace(
        settings.emd, steps=tenth(settings.emd.steps), fake_score_warmup=settings.emd.fake_score_warmup // 10
    )
    teacher = dataclasses.replace(settings.teacher, steps=tenth(settings.teacher.steps))
    fashion = dataclasses.replace(settings.fashion, classifier_steps=tenth(settings.fashion.classifier_steps))
    return dataclasses.replace(settings, emd=emd, teacher=teacher, fashion=fashion)
