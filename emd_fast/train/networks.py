"""Preparation of a trainer's networks: checks, copies of the teacher, fusion, sharding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from emd_fast import distributed
from emd_fast.config import ConfigError, EMDConfig
from emd_fast.diffusion.denoiser import Denoiser, unwrap
from emd_fast.diffusion.few_step import FewStepGenerator
from emd_fast.diffusion.generator import Generator
from emd_fast.fusion.fusing import fuse_known, fusion_report, unfuse
from emd_fast.train import adapters, average, quantised_base, rungs
from emd_fast.train.adapted_rows import AdaptedRows
from emd_fast.train.cast_weights import cast_weights, trainable
from emd_fast.train.fingerprint import fingerprint, process_of, sizes_of
from emd_fast.train.gathering import Gather, check_passes, check_phase, choose_gather
from emd_fast.train.memory import available
from emd_fast.train.parameter_counts import ParameterCounts
from emd_fast.train.precision import compute_dtype
from emd_fast.train.sample_sizes import Shape

# Of alpha at t_star where noise is predicted. The rounding of an output in float16 or TF32, 2^-11, times
# 1 / alpha is then half of the data's standard deviation.
_LEAST_SIGNAL = 1e-3


@dataclass(frozen=True)
class Prepared:
    """The networks of a trainer, ready for their first step.

    Attributes:
        three: generator, teacher and fake score; in eval mode, fused and spread as configured. Only
            the teacher's parameters require no gradient; with adapters, only these require it.
        ema: average of the generator's weights.
        own: by network with an adapter, and "ema": names of its tensors that are not the teacher's.
        teacher_facts: {"path": origin or None, "sha256": fingerprint, "process": `process_of`}, of the
            teacher as passed in; with several sizes also {"shapes": of x}.
        device, compute_dtype: where and in which dtype the networks run.
        parallel: the parallel mode and how networks are gathered, and why, in one line.
        shapes: of one z and one x, for each size of the run.
    """

    three: tuple[nn.Module, Denoiser, Denoiser]
    ema: average.EMA[nn.Module]
    own: dict[str, frozenset[str]]
    teacher_facts: dict[str, Any]
    device: torch.device
    compute_dtype: torch.dtype
    parallel: str
    shapes: tuple[Shape, ...]


def prepare(teacher: Denoiser, config: EMDConfig, generator: nn.Module | None, fake_score: Denoiser | None) -> Prepared:
    """Checks, copies, casts, fuses and shards the networks that EMDTrainer was given.

    Raises:
        ValueError, ConfigError: networks that EMDTrainer refuses; its documentation lists them.
    """
    if config.batch_size < distributed.world_size():
        raise ConfigError(
            f"batch_size must be at least the number of ranks, {distributed.world_size()}, got {config.batch_size}"
        )
    shapes = _shapes(generator, teacher)
    _check_bare(teacher=teacher, generator=generator, fake_score=fake_score)
    _check_finite("teacher", unwrap(teacher))
    start: nn.Module = teacher if generator is None else generator
    device = distributed.device_of(start)
    dtype = compute_dtype(config.compute.precision, device)
    mode, reason = quantised_base.resolve(config, sum(p.numel() for p in start.parameters()))
    adapted = config.adapter.networks if config.adapter.rank else ()
    if fake_score is not None and config.adapter.score_passes == "joint":
        raise ConfigError("score_passes must be 'separate' for a fake score that is given, got 'joint'")
    if fake_score is not None and config.adapter.base_dtype != "auto":
        raise ConfigError(
            f"base_dtype must be 'auto' for a fake score that is given, got '{config.adapter.base_dtype}': it is not "
            "on the same base"
        )
    given, teacher = teacher, _frozen(teacher, dtype, mode)
    if config.adapter.base_dtype != "auto":
        teacher = quantised_base.quantised(teacher, config.adapter.base_dtype)
    generator, fake_score = _make_trained(given, teacher, generator, fake_score, config)
    # Rank 0 computes the fingerprint; the other ranks may hold a teacher on the meta device.
    facts: dict[str, Any] = distributed.on_main(
        lambda: {
            "path": unwrap(given).source,
            "sha256": fingerprint(unwrap(given)),
            "process": process_of(unwrap(given)),
            **sizes_of([shape.sample for shape in shapes]),
        }
    )
    trained = {"generator": generator, "fake_score": fake_score}
    for name, network in {"teacher": teacher, **trained}.items():
        network.eval()  # no dropout and no batch statistics
        if name not in adapted:
            network.requires_grad_(name != "teacher")
    three = (generator, teacher, fake_score)
    if config.compute.fuse:
        _fuse_all(*three, compile=config.compute.compile, sizes=len(shapes))
    if config.adapter.score_passes == "joint":
        fake_score.without_adapter = AdaptedRows(fake_score).without
    lasting = adapters.lasting_tensors(generator) if "generator" in adapted else None
    ema = average.EMA(generator, average.profile(config.average, config.batch_size), lasting)
    if "generator" in adapted:
        trained["ema"] = ema.module
    own = {name: adapters.own_names(trained[name], teacher) for name in (*adapted, *trained.keys() & {"ema"})}
    borrowers = {name: trained[name] for name in own}
    gather = _gather(three, config, mode, device, dtype)
    _spread(three, ema.module, borrowers, mode, gather.by, device=device, dtype=dtype, config=config)
    for name, network in borrowers.items():
        if not any(p.is_meta for p in teacher.parameters()):  # else only shapes and sizes are wanted
            adapters.initialise(network, device, config.seed)
        distributed.broadcast(t for key, t in network.state_dict(keep_vars=True).items() if key in own[name])
    if config.compute.activation_checkpointing:
        _check_blocks(generator=generator, fake_score=fake_score)
    parallel = f"{mode}: {reason}" + (f"; gather {gather}" if gather.by else "")
    return Prepared(three, ema, own, facts, device, dtype, parallel, shapes)


def _frozen(teacher: Denoiser, dtype: torch.dtype, mode: str) -> Denoiser:
    """Returns the teacher with weights in the dtypes that its passes need."""
    if dtype != torch.float32:
        return cast_weights(teacher, dtype) if mode == "replicate" else teacher
    if any(p.is_floating_point() and p.itemsize < dtype.itemsize for p in teacher.parameters()):
        return trainable(teacher)  # matmuls refuse float16 weights with float32 inputs
    return teacher


def _make_trained(
    teacher: Denoiser, base: Denoiser, generator: nn.Module | None, fake_score: Denoiser | None, config: EMDConfig
) -> tuple[nn.Module, Denoiser]:
    """Returns the generator and the fake score: the given ones, copies of the teacher, or the base with an adapter.

    Args:
        teacher: as EMDTrainer was given it.
        base: the teacher of the trainer, whose tensors networks with an adapter share.

    Raises:
        ValueError: networks that EMDTrainer refuses; its documentation lists them.
    """
    adapted = config.adapter.networks if config.adapter.rank else ()
    if (generator is None or fake_score is None) and not any(True for _ in teacher.parameters()):
        raise ValueError("this teacher has no parameters to start from: give EMDTrainer a generator and a fake score")

    def started(name: str) -> Denoiser:
        return adapters.sharing(base) if name in adapted else trainable(teacher)

    # What is given must be apart from the teacher; the base of an adapter of its own may be shared.
    given = {"teacher": teacher, "generator": generator, "fake_score": fake_score}
    _check_apart(adapted, **{name: each for name, each in given.items() if each is not None})
    if generator is None:
        dtype = compute_dtype(config.compute.precision, distributed.device_of(teacher))
        generator = rungs.start(started("generator"), config, dtype)
    else:
        rungs.check_given(generator, config)
    _check_start(generator)
    if fake_score is not None and fake_score.takes_rung and fake_score.rungs != config.calls:
        raise ConfigError(f"rungs must be {fake_score.rungs}, as the given fake score takes, got {config.calls}")
    if fake_score is None:
        fake_score = started("fake_score")
        if config.calls > 1 and "fake_score" not in adapted:
            fake_score.take_rungs(config.calls)
    for name, network in {"generator": generator, "fake_score": fake_score}.items():
        if name in adapted:
            adapters.add(network, config.adapter, name, config.seed)
    return generator, fake_score


def _check_start(generator: nn.Module) -> None:
    """Refuses a generator that divides by almost no signal: D = (x_t - sigma F) / alpha for predicted noise.

    Drawn times may lie there, because score and fake-score loss do not divide by alpha.

    Raises:
        ConfigError: alpha(t_star) is below `_LEAST_SIGNAL`, and the network predicts noise.
    """
    if not isinstance(generator, (Generator, FewStepGenerator)) or generator.denoiser.parametrization != "eps":
        return
    schedule = generator.denoiser.schedule
    alpha = schedule.alpha(torch.tensor([generator.t_star], device="cpu")).item()
    if alpha >= _LEAST_SIGNAL:
        return
    last = schedule.t_from_log_snr(torch.tensor([2 * math.log(_LEAST_SIGNAL)], device="cpu")).item()
    raise ConfigError(
        f"t_star = {generator.t_star:g} has alpha = {alpha:.2g}, and a network that predicts noise is divided by it: "
        f"take t_star up to {math.floor(last * 1e3) / 1e3:g}, or a teacher with v_prediction or sample"
    )


def _shapes(generator: nn.Module | None, teacher: Denoiser) -> tuple[Shape, ...]:
    """Shapes of z and x of all sizes: those of a generator that has its own, else those of the teacher.

    Raises:
        ValueError: neither has one, or a teacher has several and the generator makes one.
    """
    samples = unwrap(teacher).sample_shapes
    own, latent = (getattr(generator, name, None) for name in ("sample_shape", "latent_shape"))
    if len(samples) > 1 and latent is not None:
        raise ValueError(f"a generator with a latent_shape makes samples of one size, and the teacher has {samples}")
    if own is not None and len(samples) < 2:
        samples = (tuple(own),)
    if not samples:
        raise ValueError("give the teacher's Denoiser a sample_shape, so that the trainer knows what to generate")
    return tuple(Shape(tuple(latent or shape), shape) for shape in samples)


def _fuse_all(*networks: nn.Module, compile: bool, sizes: int) -> None:
    """Fuses all networks, or none.

    Args:
        sizes: number of sizes of a sample that blocks are compiled for.

    Raises:
        ConfigError: `fuse` refuses one of them.
    """
    done = []
    try:
        for network in networks:
            if compile:
                unfuse(network)  # a network that came fused is not compiled yet
            bare = not fusion_report(network).fused
            fuse_known(network, compile=compile, sizes=sizes)
            if bare:
                done.append(network)
    except ValueError as error:
        for network in done:
            unfuse(network)
        raise ConfigError(f"fuse must be False for this network: {error}") from error


def _spread(
    networks: Sequence[nn.Module],
    average: nn.Module,
    borrowers: Mapping[str, nn.Module],
    mode: str,
    gather: Mapping[str, str],
    *,
    device: torch.device,
    dtype: torch.dtype,
    config: EMDConfig,
) -> None:
    """Replicates or shards the networks over the ranks.

    Args:
        networks: generator, teacher and fake score; compute in `dtype`.
        average: computes in float32, since it is the result of a run.
        borrowers: those that share the teacher's tensors; their adapters are on every rank.
        mode: as `distributed.resolve` returns it.
        gather: "phase" or "block" by network; "phase" where it is not named. That of the average
            is the generator's.
    """
    if distributed.world_size() == 1:
        return
    mesh = distributed.make_mesh(mode, device, config.parallelism.shard_group)
    following = distributed.Borrowers(networks[1], list(borrowers.values()))
    named = {**dict(zip(("generator", "teacher", "fake_score"), networks, strict=True)), "ema": average}
    for name, network in named.items():
        if name not in borrowers:
            precision = torch.bfloat16 if dtype == torch.bfloat16 and name != "ema" else None
            how = gather.get("generator" if name == "ema" else name, "phase")
            offload = name in config.parallelism.offload
            distributed.shard(network, mode, precision=precision, mesh=mesh, device=device, gather=how, offload=offload)
    following.follow(mesh, distributed.offload_policy("teacher" in config.parallelism.offload, device))


def _gather(
    networks: Sequence[nn.Module], config: EMDConfig, mode: str, device: torch.device, dtype: torch.dtype
) -> Gather:
    """Chooses how the networks are gathered, by the memory of a GPU; once a phase on a CPU.

    Args:
        networks: generator, teacher and fake score, not spread yet.
        mode: as `distributed.resolve` returns it.

    Raises:
        ConfigError: gather = "phase" that cannot fit, or numbers of samples with which networks
            cannot be gathered by block.
    """
    ranks = distributed.world_size()
    if ranks > 1 and mode == "replicate" and config.parallelism.offload:
        raise ConfigError(
            f"offload must be empty where every rank holds whole networks, got {list(config.parallelism.offload)}: set "
            "parallel to fsdp or hybrid"
        )
    if ranks == 1 or mode == "replicate":
        return Gather({}, "nothing is sharded")
    generator, teacher, fake_score = networks
    counts = ParameterCounts.of(teacher, generator, fake_score, config.adapter)
    options: dict[str, Any] = {
        "reduced": dtype == torch.bfloat16,
        "shard_group": config.parallelism.shard_group,
        "available": available(device) if device.type == "cuda" else None,
    }
    if options["available"] is not None:
        check_phase(counts, config, mode, ranks, **options)
    chosen = choose_gather(counts, config, mode, ranks, **options)
    check_passes(config, chosen, ranks)
    return chosen


def _check_blocks(**networks: nn.Module) -> None:
    """Checks that activation checkpointing finds blocks in each network.

    Raises:
        ConfigError: a network without blocks.
    """
    for name, network in networks.items():
        if not distributed.blocks_of(network):
            raise ConfigError(
                f"activation_checkpointing must be False: the {name} has no blocks (entries of a ModuleList) "
                "to recompute one at a time"
            )


def _check_bare(**networks: nn.Module | None) -> None:
    """Refuses DDP and FSDP2 wrappers, which would reduce gradients a second time."""
    for name, network in networks.items():
        modules = network.modules() if isinstance(network, nn.Module) else ()
        if any(isinstance(module, DistributedDataParallel) or distributed.is_fsdp(module) for module in modules):
            raise ValueError(
                f"the {name} is wrapped in DDP or FSDP2: give it bare, and set parallel in the configuration"
            )


def _check_finite(name: str, module: nn.Module) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
            raise ValueError(f"the {name}'s weights are not finite: {key} holds NaN or infinity")


def _check_apart(adapted: Sequence[str], **networks: nn.Module) -> None:
    """Refuses shared parameters: a generator around the teacher itself would train the teacher.

    Args:
        adapted: networks whose frozen parameters stay frozen, if they come with an adapter.
    """
    owner: dict[int, str] = {}
    for name, network in networks.items():
        frozen_base = name in adapted and adapters.has_adapter(network)
        for parameter in network.parameters():
            if frozen_base and not parameter.requires_grad:
                continue
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"{owner[id(parameter)]} and {name} share parameters: give each its own (deepcopy)")
