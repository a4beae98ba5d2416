"""Studies over several seeds: of the Langevin step count K and noise cancellation, and of adapters.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emd_fast.config import ConfigError, EMDConfig, RunConfig
from emd_fast.io.files import write_text
from emd_fast.reporting import journal
from emd_fast.reporting.progress import say
from emd_fast.run import distill
from emd_fast.tasks import task_of
from emd_fast.train import checkpoint, run_checkpoints


@dataclass(frozen=True)
class Variant:
    """A row of the table: its name, and the configuration that its seeds share."""

    name: str
    settings: RunConfig


Subject = Literal["langevin", "adapters"]


def conduct(settings: RunConfig, folder: Path, of: Subject = "langevin", adapter_rate: float = 1.0) -> Path:
    """Runs each variant with each seed; writes study.json and study.md. Returns study.md's path.

    Args:
        of: "langevin" varies K; "adapters", for digits, compares adapters with whole networks.
        adapter_rate: learning rates of adapters over those of whole networks.

    Raises:
        ConfigError: the task is "pretrained", which has no study, or "gmm" with adapters; adapter_rank
            is set for a study that varies it.
    """
    if settings.task == "pretrained":
        raise ConfigError("a teacher from a file has no study: its generators have no metric to be compared by")
    if of == "adapters" and settings.task != "digits":
        raise ConfigError(
            "a study of adapters needs the task digits: the networks of gmm do not start from its teacher"
        )
    if of == "adapters" and settings.emd.adapter.rank:
        raise ConfigError("a study of adapters varies adapter_rank: leave it out")
    if of == "adapters":
        variants = _adapters(settings, adapter_rate)
    else:
        variants = _digits(settings) if settings.task == "digits" else _mixture(settings)
    seeds = 3 if settings.task == "digits" else 5
    folder.mkdir(parents=True, exist_ok=True)
    if settings.task == "digits":
        # The variants share one teacher, since they compare distillations.
        task_of(settings).make_teacher(folder, None)
    results: dict[str, list[dict[str, Any]]] = {}
    for variant in variants:
        for seed in range(seeds):
            own = folder / f"{re.sub('[^A-Za-z0-9]+', '-', variant.name).strip('-')}-seed{seed}"
            own.mkdir(exist_ok=True)
            if run_checkpoints.exists(folder / "teacher") and not run_checkpoints.exists(own / "teacher"):
                checkpoint.save(own / "teacher", checkpoint.load(folder / "teacher"))
            emd = dataclasses.replace(variant.settings.emd, seed=seed)
            say(f"study: {variant.name}, seed {seed}")
            metrics = distill.distill(dataclasses.replace(variant.settings, emd=emd), own)
            results.setdefault(variant.name, []).append({**_numbers(metrics), **_gradient_norm(own)})
    write_text(folder / "study.json", json.dumps(results, indent=1))
    lines = [
        f"# {'Digits' if settings.task == 'digits' else 'A mixture'}: the study",
        "",
        _question(settings, seeds, adapter_rate if of == "adapters" else None),
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


def _adapters(settings: RunConfig, rate: float) -> list[Variant]:
    """Whole networks, and adapters of two ranks; the same steps."""
    emd = settings.emd
    rates = dataclasses.replace(
        emd.optimizer,
        generator_lr=rate * emd.optimizer.generator_lr,
        fake_score_lr=rate * emd.optimizer.fake_score_lr,
    )
    variants = [Variant("whole networks", settings)]
    for rank in (8, 32):
        changed = dataclasses.replace(emd, adapter=dataclasses.replace(emd.adapter, rank=rank), optimizer=rates)
        variants.append(Variant(f"adapters, rank {rank}", dataclasses.replace(settings, emd=changed)))
    return variants


def _mixture(settings: RunConfig) -> list[Variant]:
    """Variants that spend as many network passes as the recipe; K = 1 is VSD, without a z step."""
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
    """Counts the network passes of an optimizer step.

    A forward pass counts 1, a backward pass to the input 1, and a full backward pass 2.
    """
    fake_score_step = 1 + 1 + 2
    langevin_step = 3 if config.objective == "vsd" else 4
    m_step = 1 + 2
    steps = 1 if config.objective == "vsd" else config.langevin_steps
    return config.fake_score_updates * fake_score_step + steps * langevin_step + m_step


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metrics of the generator.

    They include the Fréchet distance relative to real data, or the least and greatest mass of a
    mode.
    """
    row = {
        key: value["generator"]
        for key, value in metrics.items()
        if isinstance(value, dict) and isinstance(value.get("generator"), (int, float))
    }
    if "mass" in metrics:
        masses = metrics["mass"]["generator"]
        row |= {"least mass": min(masses), "greatest mass": max(masses), "mass": masses}
    else:
        row["frechet over real"] = metrics["frechet"]["generator"] / metrics["frechet"]["real"]
    return {**row, "steps": metrics["steps"], "seconds": metrics["seconds"]["distil"]}


def _gradient_norm(folder: Path) -> dict[str, float]:
    """Median norm of the generator's gradient over the second half of the run: its noise level."""
    rows: Sequence[dict[str, Any]] = journal.read(folder / "log.jsonl")
    norms = [row["generator_grad_norm"] for row in rows[len(rows) // 2 :] if row.get("generator_grad_norm") is not None]
    return {"gradient norm": statistics.median(norms) if norms else math.nan}


def _question(settings: RunConfig, seeds: int, adapter_rate: float | None) -> str:
    if adapter_rate is not None:
        return (
            f"Adapters instead of whole networks on digits: {seeds} seeds each, one teacher, {settings.emd.steps} "
            f"optimizer steps for all. Learning rates of adapters are {adapter_rate:g} times those of whole networks."
        )
    if settings.task == "digits":
        return (
            f"Effect of K and of noise cancellation on digits: {seeds} seeds each, one teacher, "
            f"{settings.emd.steps} optimizer steps for all, so a larger K also costs more network evaluations. "
            "Differences within the spread of the seeds are not significant."
        )
    return (
        f"Effect of Langevin steps on the coverage of a mixture: {seeds} seeds each, exact teacher score. Each "
        f"variant spends {settings.emd.steps * passes(settings.emd)} network passes, so a larger K makes fewer "
        "optimizer steps. Too small: the generator has 12 hidden units in 2 layers. Collapsed: every sample "
        "starts near one mode."
    )


def _table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A table with a row for each variant: mean and standard deviation over the seeds."""
    keys = [key for key, value in next(iter(results.values()))[0].items() if not isinstance(value, list)]
    rows = [["variant", *keys]]
    for name, seeds in results.items():
        rows.append([name, *(_mean_and_spread([row[key] for row in seeds]) for key in keys)])
    rule = ["---", *["---:"] * len(keys)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _mean_and_spread(values: list[float]) -> str:
    mean, spread = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.3g} ± {spread:.2g}" if spread else f"{mean:g}"
