"""The study of Fashion-MNIST: EM Distillation beside score distillation, at equal network passes.

Each variant and seed is an ordinary run in its own folder. The tables are made from the finished runs
alone, so an interrupted study goes on where it stopped, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emd_fast import distributed
from emd_fast.config import Change, RunConfig, forbidden_change, to_dict
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.io.files import write_text
from emd_fast.io.reading import read_json, read_text
from emd_fast.reporting import journal
from emd_fast.reporting.progress import say
from emd_fast.run import distill
from emd_fast.run import folder as folders
from emd_fast.run.fashion_cells import CELLS, TIMES, Cell, check, settings_of
from emd_fast.run.folder import RunError, locked, metrics_of
from emd_fast.run.passes import passes
from emd_fast.tasks import Task, task_of
from emd_fast.train import checkpoint, run_checkpoints
from emd_fast.train.health import Diverged
from emd_fast.train.precision import compute_dtype
from emd_fast.train.trainer import EMDTrainer

_EVALUATIONS = 4  # along a training
_ROUNDS = 5  # timings of a step
_LABELS = {
    "frechet": "Fréchet distance",
    "frechet over teacher": "Fréchet distance / teacher",
    "teacher recall": "recall of the teacher",
    "least recall": "least recall of a class",
    "accuracy": "class accuracy",
}


def conduct(settings: RunConfig, folder: Path, cells: Sequence[str], seeds: int) -> Path:
    """Makes the runs of these cells that are not finished; writes study.json and study.md after each.

    Args:
        settings: of the task "fashion". Every run makes as many network passes as its steps do.
        folder: of the study. The runs are in runs/, and share the teacher in teacher/.
        cells: letters of `fashion_cells`, in order.
        seeds: seeds of each variant.

    Returns:
        The path of study.md.

    Raises:
        ConfigError: settings that the cells vary.
        RunError: the folder was begun by other settings, or is in use.
        Interrupted: a signal ended the study.
    """
    check(settings)
    with contextlib.ExitStack() as held:
        task = task_of(settings)
        distributed.on_main(lambda: _open(folder, settings, task, held))
        task.open_references()
        teacher, _ = distill.teacher_of(task, folder)

        def write() -> None:
            distributed.on_main(lambda: _write(settings, folder, seeds))

        write()
        for letter in cells:
            if letter == TIMES:
                _time(settings, folder, teacher)
                write()
                continue
            for seed in range(seeds):
                for name, changes in CELLS[letter].variants.items():
                    run, own = settings_of(settings, changes, seed), run_folder(folder, settings, changes, seed)
                    if _has_curve(settings, changes):
                        run = _with_curve(run)
                    if row_of(own) is None and not (own / "diverged").exists():
                        say(f"study: cell {letter}, {name}, seed {seed}")
                        _make(run, own, folder)
                        write()
        return folder / "study.md"


def _open(folder: Path, settings: RunConfig, task: Task, held: contextlib.ExitStack) -> None:
    """Locks the folder of a study until `held` closes, and writes its settings and where it computes.

    Raises:
        RunError: the folder was begun by other settings or on another kind of device, or is in use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(locked(folder))
    if (folder / "config.toml").exists():
        was = folders.settings_of(folder)
        change = forbidden_change(was, settings)
        if change is None and was.emd.steps != settings.emd.steps:  # a run may go on to more steps, a budget may not
            change = Change("emd.steps", was.emd.steps, settings.emd.steps)
        if change is not None:
            raise RunError(
                f"{folder} holds a study with {change.key} = {change.was!r}, not {change.now!r}: choose another --out"
            )
    dtype = compute_dtype(settings.emd.compute.precision, task.device)
    here, place = f"{task.device.type} in {str(dtype).removeprefix('torch.')}", folder / "device"
    before = read_text(place).strip() if place.exists() else here
    if before != here:
        raise RunError(f"{folder} holds a study on {before}, and this one would go on on {here}: choose another --out")
    folders.write_config(folder, settings)
    write_text(place, f"{here}\n")


def run_folder(folder: Path, settings: RunConfig, changes: dict[str, Any], seed: int) -> Path:
    """The folder of a run. Cells that compare one configuration share its run."""
    emd = to_dict(settings_of(settings, changes, 0))["emd"]
    plain = to_dict(settings)["emd"]
    differing = {key: value for key, value in emd.items() if value != plain.get(key) and key not in ("steps", "seed")}
    words = [f"{key}-{value}" for key, value in sorted(differing.items())] or ["plain"]
    name = re.sub("[^A-Za-z0-9.]+", "-", "-".join(words))
    digest = hashlib.sha256(json.dumps(differing, sort_keys=True).encode()).hexdigest()[:8]
    return folder / "runs" / f"{name}-{digest}-seed{seed}"


def _has_curve(settings: RunConfig, changes: dict[str, Any]) -> bool:
    run = settings_of(settings, changes, 0)
    curves = [other for cell in CELLS.values() if cell.curve for other in cell.variants.values()]
    return any(settings_of(settings, other, 0) == run for other in curves)


def _with_curve(run: RunConfig) -> RunConfig:
    # At logged steps, so that the seconds of training can be told from those of an evaluation.
    steps = max(1, run.emd.steps // _EVALUATIONS // run.log_every) * run.log_every
    every = steps * run.emd.batch_size
    return dataclasses.replace(run, evaluation=dataclasses.replace(run.evaluation, every=every))


def _make(run: RunConfig, own: Path, folder: Path) -> None:
    def lend_teacher() -> None:
        own.mkdir(parents=True, exist_ok=True)
        if not run_checkpoints.exists(own / "teacher"):
            checkpoint.save(own / "teacher", checkpoint.load(folder / "teacher"))

    distributed.on_main(lend_teacher)
    try:
        distill.distill(run, own)
    except Diverged as error:
        reason = f"{error}\n"
        distributed.on_main(lambda: write_text(own / "diverged", reason))
        say(f"this run diverged, and the study goes on: {error}")


def row_of(own: Path) -> dict[str, Any] | None:
    """The row of a finished run; None before its end."""
    metrics = metrics_of(own) if (own / "report.md").exists() else None
    if metrics is None or "frechet" not in metrics:
        return None
    settings = folders.settings_of(own)
    row = {
        name.replace("_", " "): metrics[name]["generator"]
        for name in ("frechet", "recall", "precision", "accuracy", "inception_score", "total_variation")
        if "generator" in metrics.get(name, {})
    }
    by_class = [recall for recall in metrics["recall_by_class"]["generator"] if recall is not None]
    rows = journal.read(own / "log.jsonl")
    norms = [row["generator_grad_norm"] for row in rows if row.get("generator_grad_norm") is not None]
    return {
        **row,
        "frechet over real": metrics["frechet"]["generator"] / metrics["frechet"]["real"],
        "frechet over teacher": metrics["frechet"]["generator"] / metrics["frechet"]["teacher"],
        "teacher recall": metrics["recall"]["teacher"],
        "least recall": min(by_class),
        "gradient norm": statistics.median(norms[len(norms) // 2 :]) if norms else None,
        "steps": metrics["steps"],
        "passes": round(metrics["steps"] * passes(settings.emd)),
        "seconds": metrics["seconds"]["distil"] - _evaluating(rows),
        "curve": {
            **{str(row["step"]): row["evaluation_frechet"] for row in rows if "evaluation_frechet" in row},
            str(metrics["steps"]): metrics["frechet"]["generator"],
        },
    }


def _evaluating(rows: Sequence[dict[str, Any]]) -> float:
    """Seconds of the evaluations of a run, whose rows follow those of their steps."""
    pairs = [(before, row) for before, row in itertools.pairwise(rows) if "evaluation_frechet" in row]
    return sum(row["seconds"] - before["seconds"] for before, row in pairs if before["step"] == row["step"])


def _write(settings: RunConfig, folder: Path, seeds: int) -> None:
    """Writes study.json and study.md from the runs that are finished."""
    results = {
        letter: {
            name: [row_of(run_folder(folder, settings, changes, seed)) for seed in range(seeds)]
            for name, changes in cell.variants.items()
        }
        for letter, cell in CELLS.items()
    }
    times = read_json(folder / "times.json") if (folder / "times.json").exists() else {}
    write_text(folder / "study.json", json.dumps({**results, TIMES: times}, indent=1))
    write_text(folder / "study.md", _text(settings, folder, seeds, results, times))


Rows = dict[str, list[dict[str, Any] | None]]


def _text(settings: RunConfig, folder: Path, seeds: int, results: dict[str, Rows], times: dict[str, Any]) -> str:
    teacher = next((row for rows in results["a"].values() for row in rows if row), None)
    side = settings.fashion.resolution
    parts = [
        "# Fashion-MNIST: the study",
        f"Images of {side}x{side}. {seeds} seeds for each variant, and one teacher. Each run makes about "
        f"{settings.emd.steps * passes(settings.emd):,.0f} network passes of {settings.emd.batch_size} samples, so "
        "that a larger K makes fewer optimizer steps. A forward pass counts 1, a backward pass to the input 1, and a "
        "full backward pass 2. A dash stands for a run that is not finished. The gradient norm is the median over the "
        "second half of a run, before clipping. Seconds are those of the training alone.",
    ]
    if teacher is not None:
        ratio = teacher["frechet over real"] / teacher["frechet over teacher"]
        parts.append(
            f"The Fréchet distance of the teacher (18 Heun steps) is {ratio:.3g} times that of real images of the "
            "train split."
        )
    for letter, cell in CELLS.items():
        parts += [f"## {letter}. {cell.title}", cell.about, *_tables(cell, results[letter], seeds)]
        for name, changes in cell.variants.items():
            for seed in range(seeds):
                said = run_folder(folder, settings, changes, seed) / "diverged"
                if said.exists():
                    parts.append(f"{name}, seed {seed}, diverged: {said.read_text().strip()}")
    parts += [f"## {TIMES}. Time of a step", _times(times)]
    return "\n\n".join(parts) + "\n"


def _tables(cell: Cell, rows: Rows, seeds: int) -> list[str]:
    head = ["variant", "seeds", *(_LABELS.get(key, key) for key in cell.keys)]
    means, spreads = [head], [["variant", *head[2:]]]
    for name, found in rows.items():
        done = [row for row in found if row]
        values = [[row[key] for row in done if row.get(key) is not None] for key in cell.keys]
        means.append([name, str(len(done)), *(_number(statistics.mean(each)) if each else "-" for each in values)])
        spreads.append([name, *(f"{statistics.stdev(each):.2g}" if len(each) > 1 else "-" for each in values)])
    parts = ["Mean over the seeds:", _table(means)]
    if seeds > 1:
        parts += ["Standard deviation over the seeds:", _table(spreads)]
    if cell.curve:
        parts += ["Fréchet distance by optimizer step, mean over the seeds:", _curves(rows)]
    return parts


def _curves(rows: Rows) -> str:
    steps = sorted({int(step) for found in rows.values() for row in found if row for step in row["curve"]})
    table = [["variant", *map(str, steps)]]
    for name, found in rows.items():
        values = [[row["curve"][str(step)] for row in found if row and str(step) in row["curve"]] for step in steps]
        table.append([name, *(_number(statistics.mean(each)) if each else "-" for each in values)])
    return _table(table)


def _time(settings: RunConfig, folder: Path, teacher: Denoiser) -> None:
    """Times the step of each K in one process, the variants in turn; writes times.json."""
    if (folder / "times.json").exists():
        return
    say("study: cell h, time of a step")
    variants = {name: changes for name, changes in CELLS["a"].variants.items() if "adaptive" not in name}
    trainers = {name: EMDTrainer(teacher, settings_of(settings, changes, 0).emd) for name, changes in variants.items()}
    found: dict[str, dict[str, float]] = {}
    for round_ in range(1 + _ROUNDS):
        for name, trainer in trainers.items():
            trainer.step()
            parts = trainer.timer.seconds()
            parts = {"whole": sum(parts.values()), **parts}
            if round_:  # the first one warms up
                best = found.setdefault(name, parts)
                found[name] = {part: min(value, best[part]) for part, value in parts.items()}
    for name, trainer in trainers.items():
        found[name]["passes"] = passes(trainer.config)
    write_text(folder / "times.json", json.dumps(found, indent=1))


def _times(times: dict[str, Any]) -> str:
    if not times:
        return "Not measured."
    rows = [["variant", "step", "fake score", "E-step", "M-step", "passes"]]
    for name, parts in times.items():
        seconds = [f"{1e3 * parts[key]:.0f} ms" for key in ("whole", "fake_score", "e_step", "m_step")]
        rows.append([name, *seconds, str(parts["passes"])])
    return f"The least of {_ROUNDS} timings, the variants in turn in one process.\n\n{_table(rows)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
