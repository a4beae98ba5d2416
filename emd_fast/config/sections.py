"""Sections of [emd]: noise levels, adapters, optimizer, average, parallelism and compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emd_fast.config.settings import ConfigError, documented, setting
from emd_fast.config.tables import validate


@documented
@dataclass(frozen=True)
class TimeDistribution:
    """Distribution of t, by the noise-to-signal ratio sigma / alpha (sigma itself for EDM)."""

    kind: Literal["log_uniform", "log_normal", "karras", "shifted"] = setting(
        "log_uniform", "distribution of sigma / alpha, in the words of docs/algorithm.md"
    )
    low: float = setting(0.05, "smallest ratio", unit="sigma / alpha", gt=0)
    high: float = setting(5.0, "largest ratio", unit="sigma / alpha", gt=0)
    mean: float = setting(-0.8, "mean of the log ratio, for log_normal", unit="log (sigma / alpha)")
    std: float = setting(1.2, "standard deviation of the log ratio, for log_normal", gt=0)
    shift: float | list[float] | None = setting(
        None, "s of shifted times, or one for each of several sizes; none for that of the teacher's scheduler", gt=0
    )

    def __post_init__(self) -> None:
        validate(self)
        if not self.low < self.high:
            raise ConfigError(f"low must be below high, got low = {self.low!r} and high = {self.high!r}")
        if self.shift is not None and self.kind != "shifted":
            raise ConfigError(f'shift must be left out for times of kind "{self.kind}", got {self.shift!r}')


@documented
@dataclass(frozen=True)
class AdapterConfig:
    """LoRA adapters (float32) on one frozen base, in place of whole networks that are trained."""

    rank: int = setting(0, "rank of the LoRA adapters; 0 trains whole networks", ge=0, flat="adapter_rank")
    alpha: float | None = setting(
        None, "an adapter is scaled by alpha / rank; none for the rank", gt=0, flat="adapter_alpha"
    )
    targets: tuple[str, ...] = setting(
        (),
        "ends of the names of the layers that get an adapter; [] for the projections of attention in networks of "
        "diffusers, for every linear layer and convolution in others",
        flat="adapter_targets",
    )
    networks: tuple[Literal["generator", "fake_score"], ...] = setting(
        ("generator", "fake_score"), "networks that are the base with an adapter", flat="adapter_networks"
    )
    base_dtype: Literal["auto", "int8", "fp8", "nf4"] = setting(
        "auto",
        "linear weights of the frozen base: the compute dtype (auto), or 8 or 4 bits, for which torchao is needed",
        flat="base_dtype",
    )
    score_passes: Literal["separate", "joint"] = setting(
        "separate",
        "teacher and fake score as two passes of the base, or as one of twice the batch",
        flat="score_passes",
        resumable=True,
    )

    def __post_init__(self) -> None:
        validate(self)
        if not self.networks or len(set(self.networks)) < len(self.networks):
            raise ConfigError(
                f"adapter_networks must name generator, fake_score or both, each once, got {list(self.networks)}"
            )
        if self.score_passes == "joint" and not (self.rank and "fake_score" in self.networks):
            raise ConfigError('score_passes must be "separate" where the fake score has no adapter, got "joint"')
        if self.base_dtype != "auto" and not (self.rank and "fake_score" in self.networks):
            raise ConfigError(
                f'base_dtype must be "auto" where the fake score has no adapter, got "{self.base_dtype}": its rounding '
                "would be in the difference of the scores"
            )
        if "" in self.targets:
            raise ConfigError("adapter_targets must be names of layers, got an empty one")


@documented
@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizers of the generator and the fake score: AdamW and the learning-rate schedule."""

    name: Literal["adamw", "apex_adamw", "adamw_8bit"] = setting(
        "adamw", "AdamW of torch, of NVIDIA apex, or of torchao with 8-bit state", flat="optimizer_name"
    )
    generator_lr: float = setting(1e-3, "learning rate of the generator", gt=0)
    fake_score_lr: float = setting(2e-3, "learning rate of the fake score", gt=0)
    betas: tuple[float, float] = setting((0.0, 0.99), "decay rates of AdamW's two moments", ge=0, lt=1)
    weight_decay: float = setting(0.0, "decoupled weight decay of AdamW", ge=0)
    lr_warmup: int = setting(0, "linear warm-up of both learning rates", unit="steps", ge=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "both learning rates after the warm-up, down to lr_end"
    )
    lr_end: float = setting(0.0, "last learning rate as a fraction of the full one", ge=0, le=1)
    grad_clip: float = setting(1.0, "largest norm of a network's gradient; 0 for no clipping", ge=0)

    def __post_init__(self) -> None:
        validate(self)


@documented
@dataclass(frozen=True)
class AverageConfig:
    """Exponential moving average of the generator's weights."""

    ema_profile: Literal["constant", "power", "half_life"] = setting("constant", "how the decay depends on the step")
    ema: float = setting(0.99, "largest decay under constant: min(ema, (1 + step) / (10 + step))", ge=0, lt=1)
    ema_power: float = setting(6.94, "exponent under power: decay (1 - 1 / (step + 1))^(ema_power + 1)", gt=0)
    ema_half_life: float = setting(50_000.0, "age at which weights count half, under half_life", unit="samples", gt=0)

    def __post_init__(self) -> None:
        validate(self)


@documented
@dataclass(frozen=True)
class ParallelismConfig:
    """Layout of the networks over several devices."""

    parallel: Literal["auto", "replicate", "fsdp", "hybrid"] = setting(
        "auto", "copies, shards (FSDP2) or both; auto copies up to 10^9 parameters", resumable=True
    )
    shard_group: int = setting(
        0,
        "devices that share one copy under hybrid; 0 for those of one machine",
        unit="devices",
        ge=0,
        resumable=True,
    )
    gather: Literal["auto", "phase", "block"] = setting(
        "auto",
        "sharded networks whole for all passes of a phase, or block by block at each pass; auto by memory",
        resumable=True,
    )
    offload: tuple[Literal["teacher", "fake_score"], ...] = setting(
        (),
        "sharded networks whose shards are in host memory, with their gradients and optimizer state",
        resumable=True,
    )

    def __post_init__(self) -> None:
        validate(self)
        if len(set(self.offload)) < len(self.offload):
            raise ConfigError(f"offload must name each network once, got {list(self.offload)}")


@documented
@dataclass(frozen=True)
class ComputeConfig:
    """How a device computes the passes."""

    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "dtype of the passes; auto is bfloat16 on a GPU, float32 elsewhere"
    )
    micro_batch_size: int = setting(
        0, "samples of a device per pass; 0 for its whole share", unit="samples", ge=0, resumable=True
    )
    activation_checkpointing: bool | Literal["all"] = setting(
        False,
        "recompute activations in the backward passes of M-step and fake-score step, to save memory; all for those of "
        "the Langevin steps too",
        resumable=True,
    )
    fuse: bool = setting(True, "run norms, attention and conditioning by the fused ops", resumable=True)
    compile: bool = setting(False, "torch.compile the repeated blocks; needs fuse", resumable=True)
    cuda_graph: bool | Literal["auto"] = setting(
        False,
        "capture the E-step as one CUDA graph; auto where the networks are not sharded and a pass has few samples",
        resumable=True,
    )

    def __post_init__(self) -> None:
        validate(self)
        if self.compile and not self.fuse:
            raise ConfigError("compile must be False without fuse, got True")
