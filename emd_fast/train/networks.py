"""What a trainer makes of the networks it is given, before it trains them: checks, copies of the teacher, fusing."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from emd_fast import distributed
from emd_fast.config import ConfigError, EMDConfig
from emd_fast.diffusion.denoiser import Denoiser, unwrap
from emd_fast.diffusion.generator import Generator
from emd_fast.fusion.fusing import fuse_known, fusion_report, unfuse
from emd_fast.train.cast_weights import trainable


def make_trainable(
    teacher: Denoiser, generator: nn.Module | None, fake_score: Denoiser | None, config: EMDConfig
) -> tuple[nn.Module, Denoiser]:
    """Generator and fake score: those that are given, or copies of the teacher.

    Raises:
        ValueError: what EMDTrainer says of the networks that it is given.
    """
    _check_bare(teacher=teacher, generator=generator, fake_score=fake_score)
    _check_finite("teacher", unwrap(teacher))
    if (generator is None or fake_score is None) and not any(True for _ in teacher.parameters()):
        raise ValueError("this teacher has no parameters to start from: give EMDTrainer a generator and a fake score")
    if generator is None:
        generator = Generator(trainable(teacher), config.t_star, input_scale=config.input_scale)
    if fake_score is None:
        fake_score = trainable(teacher)
    _check_apart(teacher=teacher, generator=generator, fake_score=fake_score)
    return generator, fake_score


def sample_shape(*owners: Any) -> tuple[int, ...]:
    """That of the first which says one.

    Raises:
        ValueError: none does.
    """
    for owner in owners:
        shape = getattr(owner, "sample_shape", None)
        if shape is not None:
            return tuple(shape)
    raise ValueError("give the teacher's Denoiser a sample_shape, so that the trainer knows what to generate")


def fuse_all(*networks: nn.Module, compile: bool) -> None:
    """All or none.

    Raises:
        ConfigError: one that `fuse` refuses.
    """
    done = []
    try:
        for network in networks:
            if compile:
                unfuse(network)  # one that came fused is not compiled yet
            bare = not fusion_report(network).fused
            fuse_known(network, compile=compile)
            if bare:
                done.append(network)
    except ValueError as error:
        for network in done:
            unfuse(network)
        raise ConfigError(f"fuse must be False for this network: {error}") from error


def check_blocks(**networks: nn.Module) -> None:
    """Whether there is something to compute again in each.

    Raises:
        ConfigError: there is not.
    """
    for name, network in networks.items():
        if not distributed.blocks_of(network):
            raise ConfigError(
                f"activation_checkpointing must be False: the {name} has no blocks (entries of a ModuleList) "
                "that could be computed again one at a time"
            )


def _check_bare(**networks: nn.Module | None) -> None:
    """Gradients would be reduced twice, and by another rule."""
    for name, network in networks.items():
        modules = network.modules() if isinstance(network, nn.Module) else ()
        if any(isinstance(module, DistributedDataParallel) or distributed.is_fsdp(module) for module in modules):
            raise ValueError(f"the {name} is wrapped in DDP or FSDP2: give it bare, and say config.parallel")


def _check_finite(name: str, module: nn.Module) -> None:
    for key, value in module.state_dict().items():
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
            raise ValueError(f"the {name}'s weights are not finite: {key} holds NaN or infinity")


def _check_apart(**networks: nn.Module) -> None:
    """A generator around the teacher itself, instead of a copy, would train the teacher without a word."""
    owner: dict[int, str] = {}
    for name, network in networks.items():
        for parameter in network.parameters():
            if owner.setdefault(id(parameter), name) != name:
                raise ValueError(f"{owner[id(parameter)]} and {name} share parameters: give each its own (deepcopy)")
