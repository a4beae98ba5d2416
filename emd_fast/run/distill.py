"""A run and its folder: config.toml, teacher/, checkpoints/, log.jsonl, metrics.json, report.md, samples/.

The same command on the same folder goes on where the run stopped, and says so; on a finished run it says that. Inside
a process group all ranks run the same functions; the main one writes and speaks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tomli_w
import torch

from emd_fast import config, distributed
from emd_fast.config import EvaluationConfig, RunConfig, to_dict
from emd_fast.diffusion.denoiser import Denoiser, Generator
from emd_fast.io.files import write_text
from emd_fast.reporting import journal, report
from emd_fast.reporting.progress import Progress, say
from emd_fast.run.best import best_of_run
from emd_fast.run.loop import train
from emd_fast.run.plan import UNKNOWN, Ceilings, Plan, Sizes, Work, available, plan
from emd_fast.run.signals import end_on_signals, stop_on_signals
from emd_fast.tasks import Task, task_of
from emd_fast.train import checkpoint, optimizers
from emd_fast.train.checkpoint import CheckpointError
from emd_fast.train.state import MAY_CHANGE
from emd_fast.train.trainer import EMDTrainer

_MAY_CHANGE = {
    *(f"emd.{name}" for name in MAY_CHANGE),
    "log_every",
    "save_every",
    "keep_checkpoints",
    "background_checkpoints",
    "peak_tflops",
    "gradient_variance",
    "samples",
    *(f"evaluation.{item.name}" for item in dataclasses.fields(EvaluationConfig)),
}


class RunError(RuntimeError):
    """A run folder that cannot be used: one line that names it and the remedy."""


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, until the block or this process ends, however it ends.

    Raises:
        RunError: there is one. OSError: the folder cannot be written.
    """
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(
                f"another run is under way in {folder} ({file.read().strip()}): let it end, or choose another --out"
            ) from None
        except OSError as error:
            say(f"warning: {folder} cannot be locked ({error.strerror}); nothing would keep a second run out of it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def distill(settings: RunConfig, folder: Path, sinks: tuple[str, ...] = ()) -> dict[str, Any]:
    """The whole of a run: teacher, distillation, evaluation, report. Returns what is in metrics.json.

    Raises:
        GroupError: ranks that differ. RunError: a folder that cannot be written, holds another run or is in use.
        CheckpointError: checkpoints that cannot be read. Diverged: training was stopped, report.md says why.
        Interrupted: by a signal; what was done is saved.
    """
    with end_on_signals(), contextlib.ExitStack() as held:
        return _distill(settings, folder, sinks, held)


def _distill(settings: RunConfig, folder: Path, sinks: tuple[str, ...], held: contextlib.ExitStack) -> dict[str, Any]:
    distributed.check_same({"the run folder": str(folder), **_flat(to_dict(settings))})
    # What is not installed is said before a teacher was trained for it.
    distributed.on_main(lambda: journal.check(sinks))
    optimizers.make(settings.emd, [torch.nn.Parameter(torch.zeros(1))], 1.0)
    distributed.on_main(lambda: _open_folder(folder, settings, held))
    finished = _finished(folder, settings)
    if finished is not None:
        say(f"{folder} is finished: {settings.emd.steps} steps, report in {folder / 'report.md'}")
        return finished
    needs = plan_of(settings)
    if distributed.world_size() > 1:
        say(needs.table())
    needs.check(available())
    task = task_of(settings)
    task.prepare_to_judge()
    teacher, seconds = _teacher(task, folder)
    trainer = _latest(settings, folder, task, teacher)
    del teacher  # the trainer may have rounded a copy, and needs its float32 weights no more
    if distributed.world_size() > 1:
        say(f"{distributed.world_size()} ranks, {trainer.parallel}")
    if trainer.steps_done:
        say(f"resuming {folder} at step {trainer.steps_done} of {settings.emd.steps}")
    seconds["distil"] = train(trainer, settings, folder, sinks, task)
    return evaluate(settings, folder, task, trainer, seconds)


def plan_of(settings: RunConfig, devices: int = 0, ceilings: Ceilings = UNKNOWN) -> Plan:
    """What the run will need of each of so many devices (those of the process group when 0), and how long a step takes
    at the least where the ceilings of the hardware are given."""
    task = task_of(settings)
    with torch.device("meta"):  # shapes alone: what cannot fit must not be allocated to find that out
        generator, student = task.make_networks()
    teacher = task.untrained_teacher()
    networks = teacher, generator or Generator(teacher, settings.emd.t_star), student or teacher
    work = Work.of(*networks, settings.emd.num_classes) if ceilings.operations is not None else None
    return plan(
        Sizes.of(*networks),
        settings.emd,
        devices=devices,
        # The tasks that ship live on the CPU, where "auto" is float32.
        reduced=settings.emd.precision == "bfloat16",
        work=work,
        ceilings=ceilings,
    )


def settings_of(folder: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
        RunError: no run there.
    """
    path = folder / "config.toml"
    if not path.exists():
        raise RunError(f"{folder} is not the folder of a run: it has no config.toml")
    return config.load(str(path))


def open_run(
    folder: Path,
    up_to: int | None = None,
    *,
    best: bool = False,
    settings: RunConfig | None = None,
    trains: bool = False,
) -> tuple[RunConfig, Task, EMDTrainer]:
    """A run as its last checkpoint has it, or the last of at most `up_to` steps, or the best one.

    Args:
        settings: in place of those in the folder, where only the evaluation differs.
        trains: as for EMDTrainer.resume.

    Raises:
        RunError: no run there, or no such checkpoint. CheckpointError: none of them can be read.
    """
    settings = settings or settings_of(folder)
    if best:
        path = checkpoint.best_of(folder / "checkpoints")
        if not checkpoint.exists(path):
            raise RunError(f"{folder} has no best checkpoint: distil with --evaluation.every IMAGES to keep one")
        checkpoint.facts(path)  # whole, before the teacher is read
        task = task_of(settings)
        teacher, _ = _teacher(task, folder)
        return settings, task, _resumed(path, settings, task, teacher, trains)
    paths = checkpoint.found(folder / "checkpoints")
    if not paths:
        raise RunError(f"{folder} has no checkpoint yet: run `emd-fast distill` on it first")
    if up_to is not None and checkpoint.step_of(paths[0]) > up_to:
        steps = ", ".join(str(checkpoint.step_of(path)) for path in paths)
        raise RunError(f"{folder} has no checkpoint at or before step {up_to}: it has those of step {steps}")
    task = task_of(settings)
    teacher, _ = _teacher(task, folder)
    return settings, task, _latest(settings, folder, task, teacher, up_to, trains=trains)


def evaluate(
    settings: RunConfig, folder: Path, task: Task, trainer: EMDTrainer, seconds: dict[str, float]
) -> dict[str, Any]:
    """Writes samples/, metrics.json and report.md; every rank computes, the main one writes."""
    say("evaluating")
    began = time.monotonic()
    teacher = trainer.teacher
    if distributed.is_sharded(teacher):  # a sharded network cannot be copied; the teacher comes from the folder again
        teacher, _ = _teacher(task, folder)
    untrained = EMDTrainer(teacher, trainer.config, *task.make_networks(), prompts=task.prompts)
    with distributed.gathered(trainer.teacher):
        metrics = task.evaluate(trainer, untrained, folder if distributed.is_main() else None)
    seconds = {**seconds, "evaluate": time.monotonic() - began}
    metrics = {**metrics, "steps": trainer.steps_done, "seconds": {k: round(v, 2) for k, v in seconds.items()}}
    if kept := best_of_run(folder):
        metrics["best"] = kept
    trained = max(map(checkpoint.step_of, checkpoint.found(folder / "checkpoints")), default=trainer.steps_done)
    if trained > trainer.steps_done:
        metrics["trained"] = trained  # it is an earlier checkpoint that was judged
    text = json.dumps(metrics, indent=1)

    def write() -> None:
        (folder / "report.md").unlink(missing_ok=True)  # with the metrics alone, the run is not finished
        write_text(folder / "metrics.json", text)
        report.write(folder)

    distributed.on_main(write)
    return metrics


def _open_folder(folder: Path, settings: RunConfig, held: contextlib.ExitStack) -> None:
    path = folder / "config.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held.enter_context(only_run_in(folder))
        (folder / "checkpoints").mkdir(exist_ok=True)
        (folder / "samples").mkdir(exist_ok=True)
        if path.exists() and _begun(folder):
            _check_same_run(folder, config.load(str(path)), settings)
        write_text(path, tomli_w.dumps(to_dict(settings)))
    except OSError as error:
        raise RunError(
            f"cannot write the run folder {folder}: {error.strerror}: {error.filename}; choose another with --out"
        ) from None


def _begun(folder: Path) -> bool:
    """Whether anything was made for the configuration there; a run that failed before that may be put right."""
    return any(path.is_file() and path.name not in ("config.toml", ".lock") for path in folder.rglob("*"))


def _check_same_run(folder: Path, was: RunConfig, now: RunConfig) -> None:
    before, after = _flat(to_dict(was)), _flat(to_dict(now))
    for key in sorted({*before, *after}):
        if before.get(key) != after.get(key) and key not in _MAY_CHANGE:
            raise RunError(
                f"{folder} holds a run with {key} = {before.get(key)!r}, not {after.get(key)!r}: choose another --out"
            )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _finished(folder: Path, settings: RunConfig) -> dict[str, Any] | None:
    path = folder / "metrics.json"
    if not path.exists() or not (folder / "report.md").exists():
        return None
    try:
        metrics = json.loads(path.read_text())
    except json.JSONDecodeError:
        return None
    return metrics if metrics.get("trained", metrics.get("steps", 0)) >= settings.emd.steps else None


def _teacher(task: Task, folder: Path) -> tuple[Denoiser, dict[str, float]]:
    """The teacher, and what making it cost."""
    progress: Progress | None = None
    began = time.monotonic()
    with stop_on_signals() as stopped:

        def on_step(step: int, total: int, loss: Any) -> None:
            nonlocal progress
            progress = progress or Progress("teacher", total)
            progress.update(step)
            if stopped():
                say("stopped: the teacher is trained from the start the next time")
                raise _Stop

        with contextlib.suppress(_Stop):
            # One rank trains it, where it has to be trained; the others read what that one wrote.
            if distributed.is_main():
                teacher = task.make_teacher(folder, on_step)
    distributed.barrier()
    if not distributed.is_main():
        teacher = task.make_teacher(folder, None)
    if progress is not None:
        progress.close()
    return teacher, {"teacher": time.monotonic() - began}


class _Stop(Exception):
    """Leaves the training of a teacher."""


def _latest(
    settings: RunConfig,
    folder: Path,
    task: Task,
    teacher: Denoiser,
    up_to: int | None = None,
    *,
    trains: bool = True,
) -> EMDTrainer:
    """The trainer of the last checkpoint (of at most `up_to` steps) that can be read, or a new one where there is
    none."""
    paths = checkpoint.found(folder / "checkpoints")
    if up_to is not None:
        paths = [path for path in paths if checkpoint.step_of(path) <= up_to]
    for path in reversed(paths):
        try:
            checkpoint.facts(path)
        except CheckpointError as error:
            say(f"skipped: {error}")
            continue
        return _resumed(path, settings, task, teacher, trains)
    if paths:
        raise CheckpointError(
            f"none of the checkpoints in {folder / 'checkpoints'} can be read; delete them to start over"
        )
    return EMDTrainer(teacher, settings.emd, *task.make_networks(), prompts=task.prompts)


def _resumed(path: Path, settings: RunConfig, task: Task, teacher: Denoiser, trains: bool) -> EMDTrainer:
    generator, student = task.make_networks()
    return EMDTrainer.resume(
        path, teacher, config=settings.emd, generator=generator, student=student, prompts=task.prompts, trains=trains
    )


def shortened(settings: RunConfig) -> RunConfig:
    """The same run with a tenth of the steps of everything: to see that it works, not to judge it."""

    def tenth(steps: int) -> int:
        return max(1, steps // 10)

    emd = dataclasses.replace(
        settings.emd, steps=tenth(settings.emd.steps), student_warmup=settings.emd.student_warmup // 10
    )
    teacher = dataclasses.replace(settings.teacher, steps=tenth(settings.teacher.steps))
    return dataclasses.replace(settings, emd=emd, teacher=teacher)
