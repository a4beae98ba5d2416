"""Studies over several seeds: of the Langevin step count K with noise cancellation, of calls, and of adapters.

Each variant and seed is an ordinary run in its own folder, so an interrupted study resumes where
it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emd_fast.config import RunConfig
from emd_fast.io.files import write_text
from emd_fast.reporting import journal
from emd_fast.reporting.progress import say
from emd_fast.run import distill
from emd_fast.run.variants import comparison
from emd_fast.tasks import task_of
from emd_fast.train import checkpoint, run_checkpoints


def conduct(settings: RunConfig, folder: Path, vary: str = "langevin_steps") -> Path:
    """Runs each variant with each seed; writes study.json and study.md. Returns study.md's path.

    Args:
        vary: what the variants differ in, "langevin_steps", "calls" or "adapters".

    Raises:
        ConfigError: the task has no such study; "pretrained" has none.
    """
    compared = comparison(settings, vary)
    folder.mkdir(parents=True, exist_ok=True)
    if settings.task == "digits":
        # The variants share one teacher, since they compare distillations.
        task_of(settings).make_teacher(folder, None)
    results: dict[str, list[dict[str, Any]]] = {}
    others: dict[str, list[dict[str, Any]]] = {}
    for variant in compared.variants:
        for seed in range(compared.seeds):
            own = folder / f"{re.sub('[^A-Za-z0-9]+', '-', variant.name).strip('-')}-seed{seed}"
            own.mkdir(exist_ok=True)
            if run_checkpoints.exists(folder / "teacher") and not run_checkpoints.exists(own / "teacher"):
                checkpoint.save(own / "teacher", checkpoint.load(folder / "teacher"))
            emd = dataclasses.replace(variant.settings.emd, seed=seed)
            say(f"study: {variant.name}, seed {seed}")
            metrics = distill.distill(dataclasses.replace(variant.settings, emd=emd), own)
            of_run = {"steps": metrics["steps"], "seconds": metrics["seconds"]["distil"]}
            results.setdefault(variant.name, []).append({**_numbers(metrics), **of_run, **_gradient_norm(own)})
            for name, (owner, samples) in compared.others.items():
                if owner == variant.name:
                    others.setdefault(name, []).append(_numbers(metrics, samples))
    results |= others
    write_text(folder / "study.json", json.dumps(results, indent=1))
    write_text(folder / "study.md", f"# {compared.title}\n\n{compared.question}\n\n{_table(results)}\n")
    return folder / "study.md"


def _numbers(metrics: dict[str, Any], samples: str = "generator") -> dict[str, Any]:
    """Metrics of one set of samples.

    They include the Fréchet distance relative to real data, or the least and greatest mass of a
    mode.
    """
    row: dict[str, Any] = {
        key: value[samples]
        for key, value in metrics.items()
        if isinstance(value, dict) and isinstance(value.get(samples), (int, float))
    }
    if "mass" in metrics:
        masses = metrics["mass"][samples]
        return {**row, "least mass": min(masses), "greatest mass": max(masses), "mass": masses}
    return {**row, "frechet over real": metrics["frechet"][samples] / metrics["frechet"]["real"]}


def _gradient_norm(folder: Path) -> dict[str, float]:
    """Median norm of the generator's gradient over the second half of the run: its noise level."""
    rows: Sequence[dict[str, Any]] = journal.read(folder / "log.jsonl")
    norms = [row["generator_grad_norm"] for row in rows[len(rows) // 2 :] if row.get("generator_grad_norm") is not None]
    return {"gradient norm": statistics.median(norms) if norms else math.nan}


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A table with a row for each variant: mean and standard deviation over the seeds."""
    keys = [key for key, value in next(iter(results.values()))[0].items() if not isinstance(value, list)]
    rows = [["variant", *keys]]
    for name, seeds in results.items():
        rows.append([name, *(_mean_and_spread([row[key] for row in seeds if key in row]) for key in keys)])
    rule = ["---", *["---:"] * len(keys)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean, spread = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.3g} ± {spread:.2g}" if spread else f"{mean:g}"
