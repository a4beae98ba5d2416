"""The training loop of a run, with its log, checkpoints, evaluations and pictures."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path

import torch
from torch import Tensor

from emd_fast import distributed
from emd_fast.config import RunConfig, to_dict
from emd_fast.reporting import journal, pictures, report
from emd_fast.reporting.progress import Progress, say, summary
from emd_fast.run.best import Best
from emd_fast.run.signals import Interrupted, stop_on_signals
from emd_fast.run.writes import FAILED, FolderWrites, RunStopped
from emd_fast.tasks import Task
from emd_fast.train import diagnostics, run_checkpoints, throughput
from emd_fast.train.checkpoint import CheckpointError
from emd_fast.train.divergence import cause
from emd_fast.train.health import Diverged, HealthCheck
from emd_fast.train.memory import GIB
from emd_fast.train.preview import denoised
from emd_fast.train.trainer import EMDTrainer

_SHOWN = 8  # images per network in a picture


def train(
    trainer: EMDTrainer, settings: RunConfig, folder: Path, sinks: tuple[str, ...], task: Task, writes: FolderWrites
) -> float:
    """Trains until `settings.emd.steps` steps are done. All ranks call it.

    Returns:
        Seconds of training, earlier parts of a resumed run included.

    Raises:
        Diverged: training must not go on; report.md says why.
        Interrupted: a signal ended the training; the state is saved.
        RunStopped: the folder cannot be written any more; what can be saved is.
    """
    total, first = settings.emd.steps, trainer.steps_done
    if not settings.emd.noise_cancellation:
        say("warning: noise_cancellation is off; the generator's gradient is much noisier without it")
    main = distributed.is_main()
    rows = [row for row in journal.read(folder / "log.jsonl", say) if row["step"] <= first]
    before = rows[-1].get("seconds") or 0.0 if rows else 0.0
    distributed.barrier()  # the main rank is about to rewrite the log that all ranks read
    checkpoint_folder = folder / "checkpoints"
    logs: list[journal.Journal] = []

    def open_files() -> None:
        run_checkpoints.clear_unfinished(checkpoint_folder)
        logs.append(journal.Journal(folder, first, sinks, to_dict(settings)))
        writes.watch_also(logs[0].path)

    distributed.on_main(open_files)
    progress = Progress("distil", total, first)
    agree, saved, stop = distributed.AsyncMax(), first if first else -1, 0
    best = Best(trainer, task, settings, folder) if settings.evaluation.every else None
    health, flops = HealthCheck(settings.emd), math.nan
    began = time.monotonic()

    def log(row: dict[str, float]) -> None:
        writes.attempt(lambda: logs[0].write(row))  # which reaches the open file wherever it is now
        writes.look()

    def save() -> None:
        nonlocal saved
        done = trainer.steps_done
        if done != saved:
            writes.check()
            trainer.save(
                run_checkpoints.path_of(checkpoint_folder, done),
                background=settings.background_checkpoints,
                then=lambda: run_checkpoints.keep_last(checkpoint_folder, settings.keep_checkpoints, done),
            )
            saved = done

    def show_again() -> None:
        """Draws the picture of the checkpoint, if the last leg was killed between the two."""
        due = first and (first % settings.save_every == 0 or first == total)
        if due and not distributed.on_main(lambda: _picture(folder, first).exists()):
            _show(trainer, folder, writes)

    try:
        show_again()
        with stop_on_signals() as stopped:
            while trainer.steps_done < total:
                stop = agree(FAILED if writes.failed else stopped())
                if stop:
                    break
                if main and math.isnan(flops) and _countable(trainer):
                    metrics, flops = throughput.counted(trainer.step)
                else:
                    metrics = trainer.step()
                worst = health.note(metrics)
                done = trainer.steps_done
                if done % settings.log_every == 0 or done == total:
                    variance = trainer.gradient_variance() if settings.gradient_variance else {}
                    numbers = _numbers(metrics | worst | trainer.diagnostics() | variance)
                    seconds = time.monotonic() - began
                    row = {"step": done, **numbers, "seconds": before + seconds}
                    row |= _speed(trainer, settings, (done - first) / seconds, flops)
                    log(row)
                    health.check(numbers, lambda: cause(trainer))
                    progress.update(done, summary(row))
                if best is not None and best.due():
                    writes.check()
                    row = {"step": done, **best.evaluate(), "seconds": before + time.monotonic() - began}
                    log(row)
                if done % settings.save_every == 0 or done == total:
                    save()
                    _show(trainer, folder, writes)
            trainer.finish_saving()  # here, where a signal cannot interrupt it
            stop = max(stop, agree.final(FAILED if writes.failed else stopped()))
            if stop >= FAILED:
                writes.check()
            if stop:
                save()
                trainer.finish_saving()
                say(f"stopped at step {trainer.steps_done} of {total}, saved; the same command resumes there")
        if stop:  # the signal may have reached another rank only
            raise Interrupted(stop)
        distributed.on_main(lambda: logs[0].close())
    except Diverged as error:
        command = f"emd-fast replay {folder} --step {trainer.steps_done - 1} --sample 0"
        reason = f"{error}. One sample of that step, Langevin step by step: `{command}`"
        writes.look()
        writes.attempt(lambda: report.write_stopped(folder, reason))
        if writes.failed is not None:
            say(f"there is no report.md: {writes.failed}")
        say(f"to look at one sample of that step: {command}")
        raise
    except (CheckpointError, RunStopped) as error:  # all ranks raise it together
        writes.rescue(trainer, error)
    finally:
        progress.close()
        with contextlib.suppress(Exception):  # an earlier error must not be replaced
            trainer.finish_saving()
        for opened in logs:
            with contextlib.suppress(Exception):
                opened.close()
    return before + time.monotonic() - began


def _countable(trainer: EMDTrainer) -> bool:
    """Whether the operations of the next step can be counted and are those of every step.

    The fake score's warm-up adds operations, and steps of several sizes have several numbers. A
    CUDA graph hides them, and torch.compile does not work under a counter; torchao's optimizer
    compiles its step.
    """
    warms_up = trainer.steps_done == 0 and trainer.config.fake_score_warmup > 0
    config = trainer.config
    compiles = trainer.posterior.captured or config.compute.compile
    several = trainer.batches.sizes.several
    return not (warms_up or several or compiles or config.optimizer.name == "adamw_8bit")


def _numbers(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Converts scalars to numbers with one host sync, and drops log-SNR bins and rungs without samples."""
    values = torch.stack([value.float() for value in scalars.values()]).tolist()
    found = dict(zip(scalars, values, strict=True))
    return {name: value for name, value in found.items() if not (diagnostics.is_group(name) and math.isnan(value))}


def _speed(trainer: EMDTrainer, settings: RunConfig, steps_per_second: float, flops: float) -> dict[str, float]:
    """The log's values about speed.

    Args:
        steps_per_second: mean over the run so far.
        flops: operations of a step on this device, or NaN.
    """
    left = settings.emd.steps - trainer.steps_done
    found = {
        "images_per_second": steps_per_second * settings.emd.batch_size,
        "eta_seconds": left / steps_per_second,
        "memory_gib": throughput.peak_memory(trainer.device) / GIB,
        **throughput.shares(trainer.timer.seconds()),
    }
    if not math.isnan(flops):
        found["tflops"] = flops * steps_per_second / 1e12
        if settings.peak_tflops:
            found["mfu"] = found["tflops"] / settings.peak_tflops
    return found


def _show(trainer: EMDTrainer, folder: Path, writes: FolderWrites) -> None:
    """Writes a picture to samples/networks/: a row each for generator, teacher and fake score.

    Samples that are not images are skipped.
    """
    if len(trainer.sample_shape) != 3 or trainer.sample_shape[0] not in (1, 3):
        return
    rows = denoised(trainer, _SHOWN)
    # Values that are not finite must not end the run here.
    images = torch.cat(list(rows.values())).nan_to_num()
    path = _picture(folder, trainer.steps_done)
    writes.look()
    writes.attempt(lambda: pictures.save_grid(path, images, columns=_SHOWN))


def _picture(folder: Path, step: int) -> Path:
    return folder / "samples" / "networks" / f"step-{step:08d}.png"
