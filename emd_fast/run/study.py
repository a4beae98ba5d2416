"""The studies: what K and noise cancellation do, over several seeds, at equal cost where that is the question.

Every variant is an ordinary run in a folder of its own, so that an interrupted study goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emd_fast.config import ConfigError, EMDConfig, RunConfig
from emd_fast.io.files import write_text
from emd_fast.reporting import journal
from emd_fast.reporting.progress import say
from emd_fast.run import distill as run
from emd_fast.tasks import task_of
from emd_fast.train import checkpoint


@dataclass(frozen=True)
class Variant:
    """One row of the table: its name and the configuration that all of its seeds share."""

    name: str
    settings: RunConfig


def conduct(settings: RunConfig, folder: Path) -> Path:
    """Runs every variant with every seed and writes study.json and study.md. Returns the path of the latter."""
    if settings.task == "pretrained":
        raise ConfigError("a teacher from a file has no study: there is nothing to measure its generators by")
    variants, seeds = (_digits(settings), 3) if settings.task == "digits" else (_mixture(settings), 5)
    folder.mkdir(parents=True, exist_ok=True)
    if settings.task == "digits":
        # One teacher for all: the variants differ in the distillation alone.
        task_of(settings).make_teacher(folder, None)
    results: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        for seed in range(seeds):
            own = folder / f"{re.sub('[^A-Za-z0-9]+', '-', variant.name).strip('-')}-seed{seed}"
            own.mkdir(exist_ok=True)
            if checkpoint.exists(folder / "teacher") and not checkpoint.exists(own / "teacher"):
                checkpoint.save(own / "teacher", checkpoint.load(folder / "teacher"))
            emd = dataclasses.replace(variant.settings.emd, seed=seed)
            say(f"study: {variant.name}, seed {seed}")
            metrics = run.distill(dataclasses.replace(variant.settings, emd=emd), own)
            results.setdefault(variant.name, []).append({**_numbers(metrics), **_gradient_norm(own)})
    write_text(folder / "study.json", json.dumps(results, indent=1))
    lines = [
        f"# {'Digits' if settings.task == 'digits' else 'A mixture'}: the study",
        "",
        _question(settings, seeds),
        "",
    ]
    write_text(folder / "study.md", "\n".join([*lines, _table(results), ""]))
    return folder / "study.md"


def _digits(settings: RunConfig) -> list[Variant]:
    def variant(name: str, **changes: Any) -> Variant:
        return Variant(name, dataclasses.replace(settings, emd=dataclasses.replace(settings.emd, **changes)))

    return [
        *(variant(f"K = {k}", langevin_steps=k) for k in (1, 4, 8)),
        variant("K = 8, no cancellation", langevin_steps=8, noise_cancellation=False),
    ]


def _mixture(settings: RunConfig) -> list[Variant]:
    """K = 1 is VSD: without a step in z. All spend the passes of the recipe's own run."""
    budget = settings.emd.steps * passes(settings.emd)
    variants = []
    for start, mixture in {
        "too small": dataclasses.replace(settings.mixture, generator_width=12, generator_layers=1),
        "collapsed": dataclasses.replace(settings.mixture, collapsed=True),
    }.items():
        for k in (1, 2, 4, 8, 16):
            emd = dataclasses.replace(settings.emd, langevin_steps=k, objective="vsd" if k == 1 else "emd")
            emd = dataclasses.replace(emd, steps=max(1, round(budget / passes(emd))))
            name = f"{start}, {'VSD (K = 1)' if k == 1 else f'K = {k}'}"
            variants.append(Variant(name, dataclasses.replace(settings, mixture=mixture, emd=emd)))
    return variants


def passes(config: EMDConfig) -> int:
    """Network passes in one optimizer step: a forward pass is 1, a backward pass 1 to the input and 2 in full."""
    student_step = 1 + 1 + 2
    langevin_step = 3 if config.objective == "vsd" else 4
    m_step = 1 + 2
    steps = 1 if config.objective == "vsd" else config.langevin_steps
    return config.student_updates * student_step + steps * langevin_step + m_step


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The student's numbers; the Fréchet distance relative to real data, the masses of its poorest and richest mode."""
    row = {
        key: value["student"]
        for key, value in metrics.items()
        if isinstance(value, dict) and isinstance(value.get("student"), (int, float))
    }
    if "mass" in metrics:
        masses = metrics["mass"]["student"]
        row |= {"least mass": min(masses), "greatest mass": max(masses), "mass": masses}
    else:
        row["frechet over real"] = metrics["frechet"]["student"] / metrics["frechet"]["real"]
    return {**row, "steps": metrics["steps"], "seconds": metrics["seconds"]["distil"]}


def _gradient_norm(folder: Path) -> dict[str, float]:
    """The norm of the generator's gradient over the second half of the run: how noisy its steps are."""
    rows: Sequence[dict[str, Any]] = journal.read(folder / "log.jsonl")
    return {"gradient norm": statistics.median(row["generator_grad_norm"] for row in rows[len(rows) // 2 :])}


def _question(settings: RunConfig, seeds: int) -> str:
    if settings.task == "digits":
        return (
            f"What K and noise cancellation do on digits: {seeds} seeds each, one teacher, {settings.emd.steps} "
            "optimizer steps for all, so that a larger K also spends more network evaluations. Differences within the "
            "spread of the seeds say nothing."
        )
    return (
        f"Whether Langevin steps help to cover a mixture: {seeds} seeds each, exact teacher score. Each variant spends "
        f"{settings.emd.steps * passes(settings.emd)} network passes, so a larger K makes fewer optimizer steps. Too "
        "small: 12 hidden units in 2 layers. Collapsed: every sample starts near one mode."
    )


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over the seeds, a row for each variant."""
    keys = [key for key, value in next(iter(results.values()))[0].items() if not isinstance(value, list)]
    rows = [["variant", *keys]]
    for name, seeds in results.items():
        rows.append([name, *(_mean_and_spread([row[key] for row in seeds]) for key in keys)])
    rule = ["---", *["---:"] * len(keys)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _mean_and_spread(values: list[float]) -> str:
    mean, spread = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.3g} ± {spread:.2g}" if spread else f"{mean:g}"
