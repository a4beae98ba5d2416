"""The distillation, [emd]: the keys of the algorithm, and sections for the rest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from emd_fast.config.sections import (
    AdapterConfig,
    AverageConfig,
    ComputeConfig,
    OptimizerConfig,
    ParallelismConfig,
    TimeDistribution,
)
from emd_fast.config.settings import (
    ConfigError,
    While,
    documented,
    flat_keys,
    section,
    sections,
    setting,
    settings,
)
from emd_fast.config.tables import converted, nearest, validate
from emd_fast.io.reading import shown

StepSize = float | list[tuple[float, float]]


@documented
@dataclass(frozen=True, init=False)
class EMDConfig:
    """The distillation: the algorithm, its optimizers, and how the networks run.

    The constructor also accepts the keys of the sections flat and applies them over the sections:
    `EMDConfig(generator_lr=1e-4)`, `dataclasses.replace(config, generator_lr=1e-4)`. Values are
    read from their section: `config.optimizer.generator_lr`. None stands for a section of defaults.
    """

    steps: int = setting(
        1000,
        "optimizer steps of the generator",
        unit="steps",
        gt=0,
        # A schedule that ends at the last step is another schedule when the last step moves.
        resumable=While("optimizer.lr_schedule", "constant"),
    )
    batch_size: int = setting(128, "samples in a step, over all devices", unit="samples", gt=0)
    langevin_steps: int = setting(4, "K, the Langevin steps of an E-step", unit="steps", ge=1, lt=2**16)
    gamma_eps: StepSize = setting(0.16, "Langevin step size of eps, or pairs [sigma / alpha, step size]", gt=0, lt=1)
    gamma_z: StepSize = setting(0.02, "Langevin step size of z, or pairs [sigma / alpha, step size]", ge=0, lt=1)
    integrator: Literal["euler", "exact"] = setting(
        "euler", "Langevin step: as published, or with the noise that leaves N(0, I) stationary where delta is 0"
    )
    noise_cancellation: bool = setting(True, "regress the generator on drift (true) or on eps_K (false)")
    sampling: Literal["eps_z", "x_z"] = setting("eps_z", "variables of the Langevin chain; x_z is the ablation")
    objective: Literal["emd", "vsd", "sid"] = setting(
        "emd",
        "vsd is score distillation: K = 1, gamma_z = 0, gradient / gamma_eps; sid is score identity distillation",
    )
    weighting: Literal["one", "sigma", "sigma2", "sigma_over_alpha", "adaptive"] = setting(
        "sigma2", "weight of a sample in the M-step; adaptive is that of DMD"
    )
    guidance: float | None = setting(None, "classifier-free guidance weight of the teacher")
    num_classes: int = setting(0, "draw labels below it as conditions; 0 for none", ge=0)
    t_star: float = setting(2.0, "noise level at which the teacher's network starts as the generator", unit="t")
    rungs: int | list[float] = setting(
        1, "calls of the generator: a number, or their noise levels from the highest to the lowest", unit="calls, or t"
    )
    input_scale: float | None = setting(None, "scale of z at the generator's input; none for sigma(t_star)", gt=0)
    fake_score_updates: int = setting(
        2,
        "updates of the fake score before each E-step",
        unit="steps",
        ge=1,
        why="a fake score equal to the teacher gives a score difference of exactly 0, and nothing learns",
    )
    fake_score_warmup: int = setting(0, "more updates of the fake score before the first E-step", unit="steps", ge=0)
    max_z_rms: float = setting(10.0, "stop the run when the RMS of z_K exceeds it", gt=0, resumable=True)
    max_skipped: int = setting(
        10, "stop the run after more skipped updates, or more than steps / 2", ge=0, resumable=True
    )
    seed: int = setting(0, "seed of all noise", ge=0, lt=2**63)
    time_distribution: TimeDistribution = section(TimeDistribution, "noise levels of the E-step")
    fake_score_time_distribution: TimeDistribution = section(TimeDistribution, "noise levels of the fake-score step")
    adapter: AdapterConfig = section(AdapterConfig, "LoRA adapters on one frozen base", flat=True)
    optimizer: OptimizerConfig = section(OptimizerConfig, "optimizers of the generator and the fake score", flat=True)
    average: AverageConfig = section(AverageConfig, "exponential moving average of the generator's weights", flat=True)
    parallelism: ParallelismConfig = section(
        ParallelismConfig, "layout of the networks over several devices", flat=True
    )
    compute: ComputeConfig = section(ComputeConfig, "how a device computes the passes", flat=True)

    def __init__(self, **given: Any) -> None:
        names = [item.name for item in dataclasses.fields(self)]
        flat: dict[str, dict[str, Any]] = {}
        places = flat_keys(type(self))
        for name in (name for name in given if name not in names):
            if name not in places:
                raise ConfigError(f"unknown key {shown(name)}{nearest(name, [*names, *places])}")
            flat.setdefault(places[name].section, {})[places[name].key] = given[name]
        for item in settings(type(self)):
            object.__setattr__(self, item.name, given.get(item.name, item.default))
        for item in sections(type(self)):
            value = given.get(item.name, {})
            table = converted({} if value is None else value, item.default_factory, item.name)
            object.__setattr__(self, item.name, dataclasses.replace(table, **flat.get(item.name, {})))
        validate(self)
        for name in ("gamma_eps", "gamma_z"):
            _check_step_size(name, getattr(self, name))
        _check_rungs(self)
        if self.compute.cuda_graph is True and self.sampling == "x_z":
            raise ConfigError('cuda_graph must be False or "auto" for sampling "x_z", got True')
        if self.objective == "sid":
            _check_sid(self)
        parallel, base_dtype = self.parallelism.parallel, self.adapter.base_dtype
        if base_dtype != "auto" and parallel in ("fsdp", "hybrid"):
            raise ConfigError(
                f'parallel must be "replicate" for base_dtype "{base_dtype}", got "{parallel}": a quantised base is '
                "not sharded"
            )

    @property
    def calls(self) -> int:
        """Number of rungs: network calls for one sample."""
        return len(self.rungs) if isinstance(self.rungs, list) else self.rungs

    @property
    def first_time(self) -> float:
        """Noise level of the first call: t_star, or the first of the rungs that are given as times."""
        return self.rungs[0] if isinstance(self.rungs, list) else self.t_star


def _check_sid(config: EMDConfig) -> None:
    """Whether no key asks for a Langevin chain, which sid does not have."""
    for name, found, wanted in (
        ("noise_cancellation", config.noise_cancellation, True),
        ("sampling", config.sampling, "eps_z"),
        ("cuda_graph", config.compute.cuda_graph is True, False),
    ):
        if found != wanted:
            raise ConfigError(f'{name} must be {wanted!r} for objective "sid", got {found!r}')


def _check_rungs(config: EMDConfig) -> None:
    rungs = config.rungs
    if not config.calls >= 1:
        raise ConfigError(f"rungs must be at least 1, or falling times, got {shown(rungs)}")
    if isinstance(rungs, list) and rungs != sorted(set(rungs), reverse=True):
        raise ConfigError(f"rungs must fall from the highest noise level to the lowest, got {shown(rungs)}")
    uses = 1 + config.fake_score_updates + config.fake_score_warmup  # in a step, each with its own noise
    if config.calls > 1 and config.calls * uses > 2**16:
        raise ConfigError(
            f"rungs times (1 + fake_score_updates + fake_score_warmup) must be at most 2^16, the substeps of a noise "
            f"stream, got {config.calls} times {uses}"
        )


def _check_step_size(name: str, size: StepSize) -> None:
    if not isinstance(size, list):
        return
    ratios = [ratio for ratio, _ in size]
    if not ratios or ratios[0] <= 0 or ratios != sorted(set(ratios)):
        raise ConfigError(
            f"{name} must be pairs [sigma / alpha, value] with rising sigma / alpha above 0, got {shown(size)}"
        )
    if any(value <= 0 for _, value in size):  # interpolated in logarithms
        raise ConfigError(f"{name} must be above 0 where it is a table, got {shown(size)}")
