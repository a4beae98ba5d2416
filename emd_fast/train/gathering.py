"""The choice between gathering a sharded network once a phase and block by block at each pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from emd_fast.config import ConfigError, EMDConfig
from emd_fast.train.memory import gib, memory
from emd_fast.train.parameter_counts import NETWORKS, ParameterCounts

# Of the memory of a device: the rest is for activations, where they are not known, for buffers of
# the collectives and for what the allocator cannot use.
_ROOM = 0.6
_ROOM_BESIDE_ACTIVATIONS = 0.9


@dataclass(frozen=True)
class Gather:
    """How each network is gathered, and why.

    Args:
        by: "phase" or "block" by network; empty where nothing is sharded.
        reason: in one line.
    """

    by: dict[str, str]
    reason: str

    def __str__(self) -> str:
        how = " and ".join(dict.fromkeys(self.by.values()))
        return f"by {how}: {self.reason}"


def choose_gather(
    counts: ParameterCounts,
    config: EMDConfig,
    mode: str,
    devices: int,
    *,
    reduced: bool,
    shard_group: int = 0,
    activations: float | None = None,
    available: float | None = None,
) -> Gather:
    """Chooses for each network whether it is gathered once a phase or block by block.

    Under "auto" the networks are gathered once a phase if they fit in memory so. Otherwise the
    teacher is gathered by block, then also the fake score, then also the generator, until they fit:
    the teacher's passes have no backward pass and get by with the fewest collectives. Networks with
    an adapter are gathered as the teacher, whose shards they use.

    Args:
        counts, config, mode, devices, reduced, shard_group: as for `run.plan.estimate`.
        activations: bytes of activations per sample, None if not known.
        available: bytes of memory of a device, None if not known.
    """
    if mode == "replicate" or devices == 1:
        return Gather({}, "nothing is sharded")
    phase = dict.fromkeys(NETWORKS, "phase")
    wanted = config.parallelism.gather
    if wanted == "phase":
        return Gather(phase, "asked for")
    if wanted == "block":
        return Gather(dict.fromkeys(NETWORKS, "block"), "asked for")
    if available is None:
        return Gather(phase, "auto, and no memory of a GPU is known")

    total = functools.partial(
        _total, counts, config, mode, devices, reduced=reduced, shard_group=shard_group, activations=activations
    )
    room = (_ROOM if activations is None else _ROOM_BESIDE_ACTIVATIONS) * available
    limit = f"{room / available:g} of {gib(available)} GiB"
    if total(phase) <= room:
        return Gather(phase, f"auto: {gib(total(phase))} GiB with all by phase, within {limit}")
    by = phase
    for more in _in_turn(counts):
        by = by | dict.fromkeys(more, "block")
        if total(by) <= room:
            break
    return Gather(by, f"auto: {gib(total(phase))} GiB with all by phase, more than {limit}; {gib(total(by))} so")


def _total(
    counts: ParameterCounts,
    config: EMDConfig,
    mode: str,
    devices: int,
    gather: Mapping[str, str],
    *,
    reduced: bool,
    shard_group: int,
    activations: float | None = None,
) -> float:
    """Bytes on a device in all."""
    parts = memory(
        counts,
        config,
        mode,
        devices,
        reduced=reduced,
        gather=gather,
        shard_group=shard_group,
        activations=activations or 0.0,
    )
    return sum(parts.values())


def _in_turn(counts: ParameterCounts) -> Iterator[tuple[str, ...]]:
    """Networks that go over to blocks together. Those that gain nothing are left out."""
    tied = {"teacher": ("teacher", *counts.adapters)}
    for name in ("teacher", "fake_score", "generator"):
        if name not in counts.adapters and counts.at_a_time.get(name, getattr(counts, name)) < getattr(counts, name):
            yield tied.get(name, (name,))


def check_passes(config: EMDConfig, gather: Gather, devices: int) -> None:
    """Checks that all devices make the same passes of a network that is gathered by block.

    Raises:
        ConfigError: they have different numbers of micro-batches.
    """
    if "block" not in gather.by.values():
        return
    smallest, largest = config.batch_size // devices, -(-config.batch_size // devices)
    size = config.compute.micro_batch_size or largest
    if -(-smallest // size) != -(-largest // size):
        raise ConfigError(
            f"batch_size must be a multiple of the {devices} devices where gather is 'block', or gather 'phase': of "
            f"{config.batch_size} samples some have {smallest} and some {largest}, and different numbers of "
            f"micro-batches of {size}"
        )


def check_phase(
    counts: ParameterCounts,
    config: EMDConfig,
    mode: str,
    devices: int,
    *,
    reduced: bool,
    shard_group: int,
    available: float,
) -> None:
    """Checks that gather = "phase" fits in memory where it was asked for, activations left out.

    Args:
        counts, config, mode, devices, reduced, shard_group: as for `run.plan.estimate`.
        available: bytes of memory of a device.

    Raises:
        ConfigError: it does not.
    """
    if config.parallelism.gather != "phase" or mode == "replicate" or devices == 1:
        return
    phase, block = (
        _total(counts, config, mode, devices, dict.fromkeys(NETWORKS, how), reduced=reduced, shard_group=shard_group)
        for how in ("phase", "block")
    )
    if phase > available:
        raise ConfigError(
            f"gather = 'phase' needs {gib(phase)} GiB a device, and there are {gib(available)}: try gather = 'block', "
            f"which needs {gib(block)}"
        )
