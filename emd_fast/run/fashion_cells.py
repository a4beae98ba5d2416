"""The cells of the study of Fashion-MNIST: which runs each compares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from emd_fast.config import ConfigError, RunConfig
from emd_fast.run.passes import passes

STEPS = (1, 2, 4, 8, 16)
"""K of the E-steps that are compared."""
_VSD, _ADAPTIVE = {"objective": "vsd"}, {"objective": "vsd", "weighting": "adaptive"}
_ALL: dict[str, dict[str, Any]] = {
    "VSD": _VSD,
    "VSD, adaptive": _ADAPTIVE,
    "SiD": {"objective": "sid", "weighting": "adaptive"},
    **{f"K = {k}": {"langevin_steps": k} for k in STEPS},
}
_GUIDED: dict[str, dict[str, Any]] = {
    f"{name}, guidance {w}": changes | ({"guidance": float(w)} if w > 1 else {})
    for name, changes in (("VSD", _VSD), ("K = 4", {"langevin_steps": 4}), ("K = 8", {"langevin_steps": 8}))
    for w in (1, 2, 4)
}


@dataclass(frozen=True)
class Cell:
    """A table of the study.

    Attributes:
        title: what it compares.
        about: what a reader has to know.
        variants: name of a row -> keys of [emd] that differ from the settings of the study.
        keys: columns, as `fashion_study.row_of` names them.
        curve: whether the runs are also evaluated along their training.
    """

    title: str
    about: str
    variants: dict[str, dict[str, Any]]
    keys: tuple[str, ...]
    curve: bool = False


_QUALITY = ("frechet", "frechet over teacher", "recall", "least recall", "precision")
_COST = ("passes", "steps", "seconds")
CELLS = {
    "a": Cell(
        "Langevin steps, with classes",
        "VSD is score distillation, with the adaptive weights of DMD in the second row. SiD is score identity "
        "distillation with alpha = 1.2. Each sample has a class.",
        _ALL,
        (*_QUALITY, "accuracy", "gradient norm", *_COST),
    ),
    "b": Cell(
        "Langevin steps, without classes",
        "Teacher and generator get no class, so that the generator has to cover all ten. Total variation is that "
        "between the classes that the classifier predicts and those of the real images.",
        {name: changes | {"num_classes": 0} for name, changes in _ALL.items()},
        (*_QUALITY, "total variation", "gradient norm", *_COST),
    ),
    "c": Cell(
        "Variables of the chain, K = 8",
        "z does not move in the two chains of one variable.",
        {
            "(x, z)": {"langevin_steps": 8, "sampling": "x_z"},
            "(x)": {"langevin_steps": 8, "sampling": "x_z", "gamma_z": 0.0},
            "(eps, z)": {"langevin_steps": 8},
            "(eps)": {"langevin_steps": 8, "gamma_z": 0.0},
        },
        (*_QUALITY, "inception score", "gradient norm", *_COST),
    ),
    "d": Cell(
        "Noise cancellation, K = 8",
        "The second table has the Fréchet distance along the training.",
        {"with": {"langevin_steps": 8}, "without": {"langevin_steps": 8, "noise_cancellation": False}},
        (*_QUALITY, "gradient norm", *_COST),
        curve=True,
    ),
    "e": Cell(
        "Integrator, K = 4",
        "The step size of z is the same in all rows.",
        {
            f"{integrator}, gamma_eps {gamma}": {"langevin_steps": 4, "integrator": integrator, "gamma_eps": gamma}
            for gamma in (0.04, 0.16, 0.36)
            for integrator in ("euler", "exact")
        },
        (*_QUALITY, "gradient norm", *_COST),
    ),
    "f": Cell(
        "Guidance of the teacher",
        "The real images are not guided, so that a larger Fréchet distance is not a worse copy of the teacher. "
        "Guidance 1 is none.",
        _GUIDED,
        ("recall", "least recall", "precision", "accuracy", "frechet", "teacher recall", *_COST),
    ),
    "g": Cell(
        "Updates of the fake score, K = 4",
        "Updates before each E-step.",
        {f"{n} updates": {"langevin_steps": 4, "fake_score_updates": n} for n in (1, 2, 5)},
        (*_QUALITY, "gradient norm", *_COST),
    ),
}
TIMES = "h"
"""The cell with the time of a step by K, which has no runs."""


ALL = (*CELLS, TIMES)
"""The letters of all cells, in the order of the study."""


def chosen(letters: str) -> list[str]:
    """The letters of cells in "a,b", in the order of the study.

    Raises:
        ConfigError: another letter.
    """
    found = [letter.strip() for letter in letters.split(",")]
    for letter in found:
        if letter not in ALL:
            raise ConfigError(f"--cells must be letters of {','.join(ALL)}, got {letter!r}")
    return [letter for letter in ALL if letter in found]


def check(settings: RunConfig) -> None:
    """Whether the settings of a study leave to the cells what they vary.

    Raises:
        ConfigError: they do not.
    """
    emd = settings.emd
    for name, found, wanted in (
        ("objective", emd.objective, "emd"),
        ("sampling", emd.sampling, "eps_z"),
        ("guidance", emd.guidance, None),
        ("noise_cancellation", emd.noise_cancellation, True),
        ("num_classes", emd.num_classes, 10),
        ("rungs", emd.calls, 1),
    ):
        if found != wanted:
            raise ConfigError(f"{name} must be {wanted} for the study of fashion, whose cells vary it; got {found}")
    if not settings.teacher.label_dropout:
        raise ConfigError("teacher.label_dropout must be above 0 for the study of fashion: cell b has no classes")


def settings_of(study: RunConfig, changes: dict[str, Any], seed: int) -> RunConfig:
    """The run of a variant: as many network passes as the study's settings make."""
    budget = study.emd.steps * passes(study.emd)
    emd = dataclasses.replace(study.emd, seed=seed, **changes)
    emd = dataclasses.replace(emd, steps=max(1, round(budget / passes(emd))))
    return dataclasses.replace(study, emd=emd)
