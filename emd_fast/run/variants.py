"""Variants that the studies compare: configurations by name, and the number of network passes of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emd_fast.config import ConfigError, RunConfig
from emd_fast.run.passes import passes


@dataclass(frozen=True)
class Variant:
    """A row of the table: its name, and the configuration that its seeds share."""

    name: str
    settings: RunConfig


@dataclass(frozen=True)
class Comparison:
    """What a study compares.

    Attributes:
        title: of the report, and what it asks, in one paragraph.
        seeds: each variant is run with the seeds 0 to seeds - 1.
        others: rows besides those of the generators: name -> (variant whose runs have it, set of samples).
    """

    title: str
    question: str
    variants: list[Variant]
    seeds: int
    others: dict[str, tuple[str, str]]


def comparison(settings: RunConfig, vary: str) -> Comparison:
    """The study of a recipe.

    Args:
        vary: "langevin_steps", "calls" or "adapters".

    Raises:
        ConfigError: the task has no such study, or adapter_rank is set for a study that varies it.
    """
    if settings.task == "pretrained":
        raise ConfigError("a teacher from a file has no study: its generators have no metric to be compared by")
    found = _STUDIES.get((settings.task, vary))
    if found is None:
        known = ", ".join(f"{of} of {task}" for task, of in _STUDIES)
        raise ConfigError(f"there is no study of {vary} of {settings.task}: the studies are {known}")
    return found(settings)


def _with(settings: RunConfig, name: str, **changes: Any) -> Variant:
    return Variant(name, dataclasses.replace(settings, emd=dataclasses.replace(settings.emd, **changes)))


def _at_equal_passes(settings: RunConfig, name: str, **changes: Any) -> Variant:
    """A variant that spends as many network passes as the settings do."""
    changed = dataclasses.replace(settings.emd, **changes)
    steps = max(1, round(settings.emd.steps * passes(settings.emd) / passes(changed)))
    return _with(settings, name, **changes, steps=steps)


def _langevin_steps_of_digits(settings: RunConfig) -> Comparison:
    seeds = 3
    return Comparison(
        "Digits: the study",
        f"Effect of K and of noise cancellation on digits: {seeds} seeds each, one teacher, "
        f"{settings.emd.steps} optimizer steps for all, so a larger K also costs more network evaluations. "
        "Differences within the spread of the seeds are not significant.",
        [
            *(_with(settings, f"K = {k}", langevin_steps=k) for k in (1, 4, 8)),
            _with(settings, "K = 8, no cancellation", langevin_steps=8, noise_cancellation=False),
        ],
        seeds,
        {},
    )


def _calls_of_digits(settings: RunConfig) -> Comparison:
    seeds, calls = 3, {1: "1 call", 2: "2 calls", 4: "4 calls"}
    variants = [
        _at_equal_passes(settings, f"{said}, K = {k}", rungs=n, langevin_steps=k)
        for n, said in calls.items()
        for k in (1, 4)
    ]
    others = {f"teacher, {said}": (f"{said}, K = 1", "init") for said in calls.values()}
    return Comparison(
        "Digits: calls of the generator",
        f"Generators of 1, 2 and 4 calls on digits: {seeds} seeds each, one teacher. Each variant spends "
        f"{settings.emd.steps * passes(settings.emd):g} network passes per sample of the batch, so more calls and a "
        "larger K make fewer optimizer steps. The teacher is called at the same noise levels with the same renoising, "
        "and by Heun's method in 35 calls. Differences within the spread of the seeds are not significant.",
        variants,
        seeds,
        {**others, "teacher, 35 calls": ("1 call, K = 1", "teacher")},
    )


def _langevin_steps_of_a_mixture(settings: RunConfig) -> Comparison:
    """Variants that spend as many network passes as the recipe; K = 1 is VSD, without a z step."""
    seeds = 5
    variants = []
    for start, mixture in {
        "too small": dataclasses.replace(settings.mixture, generator_width=12, generator_layers=1),
        "collapsed": dataclasses.replace(settings.mixture, collapsed=True),
    }.items():
        own = dataclasses.replace(settings, mixture=mixture)
        for k in (1, 2, 4, 8, 16):
            name = f"{start}, {'VSD (K = 1)' if k == 1 else f'K = {k}'}"
            variants.append(_at_equal_passes(own, name, langevin_steps=k, objective="vsd" if k == 1 else "emd"))
    return Comparison(
        "A mixture: the study",
        f"Effect of Langevin steps on the coverage of a mixture: {seeds} seeds each, exact teacher score. Each "
        f"variant spends {settings.emd.steps * passes(settings.emd):g} network passes, so a larger K makes fewer "
        "optimizer steps. Too small: the generator has 12 hidden units in 2 layers. Collapsed: every sample "
        "starts near one mode.",
        variants,
        seeds,
        {},
    )


def _adapters_of_digits(settings: RunConfig) -> Comparison:
    """Whole networks, and adapters of two ranks, with the same steps."""
    seeds, emd, rate = 3, settings.emd, _ADAPTER_RATES[settings.teacher.network]
    if emd.adapter.rank:
        raise ConfigError("a study of adapters varies adapter_rank: leave it out")
    rates = {name: rate * getattr(emd.optimizer, name) for name in ("generator_lr", "fake_score_lr")}
    return Comparison(
        "Digits: adapters instead of whole networks",
        f"Adapters instead of whole networks on digits: {seeds} seeds each, one teacher, {emd.steps} optimizer steps "
        f"for all. Learning rates of adapters are {rate:g} times those of whole networks.",
        [
            Variant("whole networks", settings),
            *(_with(settings, f"adapters, rank {rank}", adapter_rank=rank, **rates) for rank in (8, 32)),
        ],
        seeds,
        {},
    )


# Learning rates of adapters over those of whole networks. On the UNet every layer has an adapter, on
# the DiT the projections of attention do. docs/studies.md has the trials.
_ADAPTER_RATES = {"unet": 1.0, "dit": 3.0}
_STUDIES: dict[tuple[str, str], Callable[[RunConfig], Comparison]] = {
    ("digits", "langevin_steps"): _langevin_steps_of_digits,
    ("digits", "calls"): _calls_of_digits,
    ("digits", "adapters"): _adapters_of_digits,
    ("gmm", "langevin_steps"): _langevin_steps_of_a_mixture,
}
