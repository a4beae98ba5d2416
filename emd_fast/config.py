"""Typed, validated configuration. A recipe in recipes/*.toml is an instance of `RunConfig`.

Every default here is the project's own; the paper's tables were not at hand.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

StepSize = float | list[tuple[float, float]]
T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used: one line that names the key, what came and what was expected."""


@dataclass(frozen=True)
class TimeDistribution:
    """How t is drawn, by the noise-to-signal ratio sigma / alpha (sigma itself for EDM).

    "log_uniform": log ratio uniform between log low and log high. "log_normal": log ratio ~ N(mean, std^2), kept
    within low and high.
    """

    kind: Literal["log_uniform", "log_normal"] = "log_uniform"
    low: float = 0.05
    high: float = 5.0
    mean: float = -0.8
    std: float = 1.2

    def __post_init__(self) -> None:
        check_types(self)
        _require(0 < self.low < self.high < math.inf, self, "low", "0 < low < high")
        _require(self.std > 0, self, "std", "above 0")


@dataclass(frozen=True)
class TeacherConfig:
    """Training of the teacher on digits (denoising score matching with EDM preconditioning)."""

    steps: int = 2000
    batch_size: int = 128
    lr: float = 4e-3
    warmup: int = 100
    ema: float = 0.995
    log_sigma_mean: float = -0.8
    log_sigma_std: float = 1.2
    channels: int = 16
    conditional: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size", "lr", "log_sigma_std", "channels"):
            _require(getattr(self, name) > 0, self, name, "above 0")
        _require(self.warmup >= 0, self, "warmup", "at least 0")
        _require(0 <= self.ema < 1, self, "ema", "in [0, 1)")
        _require(0 <= self.seed < 2**63, self, "seed", "in [0, 2^63)")


@dataclass(frozen=True)
class EMDConfig:
    """The distillation.

    Args:
        steps: optimizer steps of the generator.
        batch_size: samples in a step, over all devices.
        micro_batch_size: samples that a device takes through the networks at a time; 0 for all of its share at once.
            The gradients are those of the whole batch either way.
        activation_checkpointing: in the M-step and the fake-score step, compute the activations of each block again in
            the backward pass instead of keeping them: less memory, one more forward pass, the same gradients.
        langevin_steps: K, Langevin steps in an E-step.
        gamma_eps, gamma_z: step sizes in (0, 1) and [0, 1): a number, or pairs [sigma / alpha, value] between which
            they are interpolated linearly in both logarithms.
        noise_cancellation: regress on drift (True) or on eps_K.
        sampling: "eps_z", or "x_z" for the ablation.
        objective: "emd"; or "vsd": variational score distillation (Diff-Instruct), which is K = 1, gamma_z = 0 and the
            gradient divided by gamma_eps, on the same noise.
        weighting: weight of a sample in the M-step: "one", "sigma", "sigma2", "sigma_over_alpha".
        guidance: classifier-free guidance weight of the teacher, or None.
        num_classes: draw labels below it as conditions; 0 for none.
        t_star: noise level, in the schedule's t, at which the teacher's network starts as the generator.
        input_scale: scale of z at the generator's input; sigma(t_star) when None.
        time_distribution: of t in the E-step; fake_score_time_distribution: in the fake-score step.
        fake_score_updates: fake-score steps before each E-step; fake_score_warmup: more of them before the first.
        optimizer: "adamw" (torch's fused one), "apex_adamw" (NVIDIA's apex) or "adamw_8bit" (torchao).
        generator_lr, fake_score_lr, betas, weight_decay: of AdamW; lr_warmup: steps of linear warm-up of both rates.
        lr_schedule: of both rates after the warm-up, "constant", or "linear" or "cosine" down to lr_end times the rate
            at the last step.
        grad_clip: largest norm of a network's gradient; 0 for no clipping.
        ema_profile: of the generator's exponential moving average: "constant", decay ema, warmed up as
            min(ema, (1 + step) / (10 + step)); "power", decay (1 - 1 / (step + 1))^(ema_power + 1); "half_life", in
            which what is ema_half_life samples old counts half.
        max_z_rms: the run stops when the RMS of z_K is above it: a Langevin chain that diverged.
        max_skipped: the run stops after so many updates in all with gradients that are not finite.
        seed: of all noise.
        precision: compute dtype of the networks, "float32" or "bfloat16" (autocast); "auto" is bfloat16 on a GPU.
            Weights and optimizer are float32.
        parallel: how the networks lie on several devices: "replicate", "fsdp", "hybrid" (shards within groups of
            devices, copies across them) or "auto": replicate up to a billion parameters of the generator.
        shard_group: devices that hold one copy together under "hybrid"; those of one machine when 0.
        fuse: the norms, attention, embeddings and frozen weights of the three networks served by `emd_fast.fuse`, where
            it knows them; what it does not know stays.
        compile: their repeated blocks compiled by torch.compile, around the fused ops; needs fuse.
        cuda_graph: the E-step as one CUDA graph, for batches so small that the host cannot keep up. Not for sharded
            networks, which run without.
    """

    steps: int = 1000
    batch_size: int = 128
    micro_batch_size: int = 0
    activation_checkpointing: bool = False
    langevin_steps: int = 4
    gamma_eps: StepSize = 0.16
    gamma_z: StepSize = 0.02
    noise_cancellation: bool = True
    sampling: Literal["eps_z", "x_z"] = "eps_z"
    objective: Literal["emd", "vsd"] = "emd"
    weighting: Literal["one", "sigma", "sigma2", "sigma_over_alpha"] = "sigma2"
    guidance: float | None = None
    num_classes: int = 0
    t_star: float = 2.0
    input_scale: float | None = None
    time_distribution: TimeDistribution = field(default_factory=TimeDistribution)
    fake_score_time_distribution: TimeDistribution = field(default_factory=TimeDistribution)
    fake_score_updates: int = 2
    fake_score_warmup: int = 0
    optimizer: Literal["adamw", "apex_adamw", "adamw_8bit"] = "adamw"
    generator_lr: float = 1e-3
    fake_score_lr: float = 2e-3
    betas: tuple[float, float] = (0.0, 0.99)
    weight_decay: float = 0.0
    lr_warmup: int = 0
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_end: float = 0.0
    grad_clip: float = 1.0
    ema_profile: Literal["constant", "power", "half_life"] = "constant"
    ema: float = 0.99
    ema_power: float = 6.94
    ema_half_life: float = 50_000.0
    max_z_rms: float = 10.0
    max_skipped: int = 10
    seed: int = 0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    parallel: Literal["auto", "replicate", "fsdp", "hybrid"] = "auto"
    shard_group: int = 0
    fuse: bool = True
    compile: bool = False
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "batch_size", "generator_lr", "fake_score_lr", "max_z_rms", "ema_power", "ema_half_life"):
            _require(getattr(self, name) > 0, self, name, "above 0")
        for name in (
            "num_classes",
            "fake_score_warmup",
            "lr_warmup",
            "grad_clip",
            "weight_decay",
            "max_skipped",
            "micro_batch_size",
            "shard_group",
        ):
            _require(getattr(self, name) >= 0, self, name, "at least 0")
        _require(0 <= self.lr_end <= 1, self, "lr_end", "in [0, 1]")
        _require(1 <= self.langevin_steps < 2**16, self, "langevin_steps", "in [1, 65536)")
        _require(
            self.fake_score_updates >= 1,
            self,
            "fake_score_updates",
            "at least 1: a fake score equal to the teacher gives a score difference of exactly 0, and nothing learns",
        )
        _require(all(0 < value < 1 for value in _values(self.gamma_eps)), self, "gamma_eps", "in (0, 1)")
        _require(all(0 <= value < 1 for value in _values(self.gamma_z)), self, "gamma_z", "in [0, 1)")
        for name in ("gamma_eps", "gamma_z"):
            size = getattr(self, name)
            if isinstance(size, list):
                ratios = [ratio for ratio, _ in size]
                _require(
                    len(ratios) > 0 and ratios[0] > 0 and ratios == sorted(set(ratios)),
                    self,
                    name,
                    "pairs [sigma / alpha, value] with rising sigma / alpha above 0",
                )
                _require(all(value > 0 for value in _values(size)), self, name, "above 0 where it is a table")
        _require(all(0 <= beta < 1 for beta in self.betas), self, "betas", "each in [0, 1)")
        _require(0 <= self.ema < 1, self, "ema", "in [0, 1)")
        _require(0 <= self.seed < 2**63, self, "seed", "in [0, 2^63)")
        _require(self.fuse or not self.compile, self, "compile", "False without fuse")
        _require(not (self.cuda_graph and self.sampling == "x_z"), self, "cuda_graph", 'False for sampling "x_z"')
        _require(self.input_scale is None or self.input_scale > 0, self, "input_scale", "above 0")
        _require(self.guidance is None or math.isfinite(self.guidance), self, "guidance", "finite")


@dataclass(frozen=True)
class MixtureConfig:
    """The 2-D task: a ring of equal modes with an exact score, and the small networks that learn from it."""

    modes: int = 8
    radius: float = 2.0
    std: float = 0.15
    generator_width: int = 64
    generator_layers: int = 2
    fake_score_width: int = 96
    fake_score_layers: int = 3
    collapsed: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in (
            "modes",
            "radius",
            "std",
            "generator_width",
            "fake_score_width",
            "generator_layers",
            "fake_score_layers",
        ):
            _require(getattr(self, name) > 0, self, name, "above 0")


@dataclass(frozen=True)
class PretrainedConfig:
    """A teacher that is there already.

    Args:
        teacher: a folder of diffusers, the name of a pipeline on the hub, a checkpoint of EDM or EDM2 (the pickle or
            what `emd-fast convert` wrote), or "package.module:function", a function that returns a Denoiser.
        prompts: a text file with a prompt in each line, or a .safetensors table of
            `emd_fast.train.conditions`; "" for none.
    """

    teacher: str = ""
    prompts: str = ""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class EvaluationConfig:
    """What the generator of a pretrained teacher is evaluated with, and how often during training.

    Args:
        every: images (samples that the training has taken) between two evaluations while it trains, each at the end of
            a step; 0 for none. The best checkpoint, by Fréchet distance, is kept. Digits and gmm bring their figures;
            a pretrained teacher needs detector and reference.
        detector: a file with a TorchScript detector, as EDM's Inception; "" for none.
        reference: statistics of real images by that detector: an .npz of EDM, or a .pkl of EDM2; "" for none.
        compare_with: a folder or .zip with as many real images as `samples`, for precision and recall; "" for none.
        clip: the folder of a CLIP model, for the score of prompts given as text; "" for none.
    """

    every: int = 0
    detector: str = ""
    reference: str = ""
    compare_with: str = ""
    clip: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        _require(self.every >= 0, self, "every", "at least 0 images")
        for name in ("reference", "compare_with"):
            if getattr(self, name) and not self.detector:
                raise ConfigError(f"{name} needs a detector: give --detector FILE")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: the task, its teacher, the distillation, and how often to write.

    Args:
        task: "digits", "gmm" or "pretrained".
        teacher: of the task "digits"; mixture: of the task "gmm"; pretrained: of the task "pretrained".
        emd: the distillation.
        evaluation: what a pretrained task is evaluated with, and how often during training.
        log_every: steps between two rows of log.jsonl (the only steps on which the host waits for the device).
        save_every: steps between two checkpoints; keep_checkpoints: how many of the last ones stay.
        background_checkpoints: write them while the training goes on, from a copy in the host's memory.
        peak_tflops: what a device can do at most in the dtype of the run, in 10^12 operations a second, from its data
            sheet; 0 where it is not known: the log then has no `mfu`.
        gradient_variance: log the variance of the generator's gradient with and without noise cancellation too, at the
            price of two M-steps in each step that is logged.
        samples: one-step samples that an evaluation draws; digits use as many as there are held-out images.
    """

    task: Literal["digits", "gmm", "pretrained"] = "digits"
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    pretrained: PretrainedConfig = field(default_factory=PretrainedConfig)
    emd: EMDConfig = field(default_factory=EMDConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    log_every: int = 10
    save_every: int = 100
    keep_checkpoints: int = 2
    background_checkpoints: bool = True
    peak_tflops: float = 0.0
    gradient_variance: bool = False
    samples: int = 2000

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("log_every", "save_every", "keep_checkpoints", "samples"):
            _require(getattr(self, name) > 0, self, name, "above 0")
        _require(self.peak_tflops >= 0, self, "peak_tflops", "at least 0")
        judged = self.evaluation
        if self.task != "pretrained":
            for name in ("detector", "reference", "compare_with", "clip"):
                if getattr(judged, name):
                    raise ConfigError(f"{name} is for pretrained teachers; the task {self.task!r} has its own figures")
        elif judged.every and not (judged.detector and judged.reference):
            raise ConfigError("evaluation.every needs a Fréchet distance: give --detector FILE and --reference FILE")
        if self.task == "digits":
            expected = 10 if self.teacher.conditional else 0
            _require(
                self.emd.num_classes == expected,
                self.emd,
                "num_classes",
                f"{expected} for digits with teacher.conditional = {str(self.teacher.conditional).lower()}",
            )


def _values(size: StepSize) -> list[float]:
    return [value for _, value in size] if isinstance(size, list) else [size]


def _require(holds: bool, config: Any, name: str, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}, got {getattr(config, name)!r}")


def check_types(config: Any) -> None:
    """Converts what is safe to convert (an int to a float, a list to a tuple, a table to its dataclass).

    Raises:
        ConfigError: a value of another type, or a number that is not finite.
    """
    hints = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value = _convert(getattr(config, item.name), hints[item.name], item.name)
        object.__setattr__(config, item.name, value)


def _convert(value: Any, wanted: Any, name: str) -> Any:
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option, name)
            except ConfigError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
        near = difflib.get_close_matches(str(value), [str(a) for a in arguments], 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, arguments))}, got {value!r}{hint}")
    elif origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(arguments):
        return tuple(_convert(v, a, name) for v, a in zip(value, arguments, strict=True))
    elif origin is list and isinstance(value, (list, tuple)):
        return [_convert(v, arguments[0], name) for v in value]
    elif isinstance(wanted, type) and dataclasses.is_dataclass(wanted) and isinstance(value, Mapping):
        return from_dict(wanted, value, name)
    elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if math.isfinite(value):
            return float(value)
    elif isinstance(wanted, type) and isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{name} must be {_spell(wanted)}, got {value!r}")


def _spell(wanted: Any) -> str:
    if wanted is type(None):
        return "nothing"
    if dataclasses.is_dataclass(wanted):
        return "a table"
    return getattr(wanted, "__name__", str(wanted)) if get_origin(wanted) is None else str(wanted)


def from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """The dataclass `cls` from what a TOML table holds.

    Raises:
        ConfigError: an unknown key (with the nearest right one), a wrong type or a value outside its range.
    """
    names = [item.name for item in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            if (renamed := key.replace("student", "fake_score")) in names:
                raise ConfigError(f"{key!r} is a key of a release before 0.2: it is {renamed!r} now")
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the keys are {', '.join(names)}"
            raise ConfigError(f"unknown key {f'{path}.{key}' if path else key!r}{hint}")
    return cls(**data)


def to_dict(config: Any) -> dict[str, Any]:
    """What TOML can hold of a configuration; None is left out, since TOML has none."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))


def recipes() -> list[str]:
    """The names of the recipes that ship with the library."""
    folder = resources.files("emd_fast") / "recipes"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load(recipe: str, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """A recipe by its name, or by the path of a TOML file, with overrides by dotted key ("emd.steps": 100).

    Raises:
        ConfigError: no such recipe (with the nearest right name), or a file that is not a valid configuration.
    """
    data = _read(recipe)
    for key, value in (overrides or {}).items():
        *tables, name = key.split(".")
        table = data
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value
    try:
        return from_dict(RunConfig, data)
    except ConfigError as error:
        raise ConfigError(f"{recipe}: {error}") from None


def _read(recipe: str) -> dict[str, Any]:
    path = Path(recipe)
    if path.suffix == ".toml":
        try:
            text = path.read_text()
        except OSError as error:
            raise ConfigError(f"cannot read the recipe {recipe}: {error.strerror}") from None
    elif recipe in recipes():
        text = (resources.files("emd_fast") / "recipes" / f"{recipe}.toml").read_text()
    else:
        near = difflib.get_close_matches(recipe, recipes(), 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"no recipe {recipe!r}: {hint}the recipes are {', '.join(recipes())}, or give the path of a .toml file"
        )
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{recipe} is not valid TOML: {error}") from None
