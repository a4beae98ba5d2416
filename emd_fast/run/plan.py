"""Plans memory, network traffic and time of a run per device, before anything is allocated.

Memory is that of `train.memory`. The memory of activations depends on networks and kernels, and the
speed of devices and network on the machine. Both are arguments; without them the plan says "not
known".
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from emd_fast import distributed
from emd_fast.config import ConfigError, EMDConfig
from emd_fast.run.work import Work
from emd_fast.train import quantised_base
from emd_fast.train.adapters import NAMES
from emd_fast.train.gathering import Gather, check_passes, choose_gather
from emd_fast.train.memory import GIB, gib, memory, offloaded, shards
from emd_fast.train.parameter_counts import NETWORKS, ParameterCounts


@dataclass(frozen=True)
class Ceilings:
    """Peak rates of the hardware as given by the user, None where not given.

    Args:
        operations: floating-point operations per second of a device, in the compute dtype.
        bytes: bytes per second that a device receives over the network.
    """

    operations: float | None = None
    bytes: float | None = None


UNKNOWN = Ceilings()


@dataclass(frozen=True)
class Footprint:
    """Requirements of one parallel mode.

    Args:
        mode: "replicate", "fsdp" or "hybrid".
        devices: number of devices.
        memory: peak bytes on each device during a step, by purpose.
        traffic: bytes that each device receives in a step, by purpose.
        seconds: lower bounds on the time of a step from the peak rates, None where not known.
        gather: how each network is gathered.
        host: bytes in host memory for each device.
    """

    mode: str
    devices: int
    memory: dict[str, float]
    traffic: dict[str, float]
    seconds: dict[str, float | None]
    gather: Gather
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def estimate(
    counts: ParameterCounts,
    config: EMDConfig,
    mode: str,
    devices: int,
    *,
    reduced: bool,
    shard_group: int = 0,
    activations: float | None = None,
    work: Work | None = None,
    ceilings: Ceilings = UNKNOWN,
    available: float | None = None,
) -> Footprint:
    """Estimates the requirements of one parallel mode.

    Args:
        counts: parameter counts of the networks.
        config: the distillation.
        mode: "replicate", "fsdp" or "hybrid".
        devices: number of devices.
        reduced: whether the networks compute in bfloat16.
        shard_group: number of devices that share one copy of the weights under "hybrid".
        activations: bytes of activations per sample in the M-step, of the largest of several sizes;
            None if not known.
        work, ceilings: operations of the networks and peak rates, which the times follow from.
        available: bytes of memory of a device, by which gather = "auto" is decided. None if not known.
    """
    share = -(-config.batch_size // devices)
    samples = min(config.compute.micro_batch_size or share, share)
    updates = config.fake_score_updates
    chosen = choose_gather(
        counts,
        config,
        mode,
        devices,
        reduced=reduced,
        shard_group=shard_group,
        activations=activations,
        available=available,
    )
    among = shards(mode, devices, shard_group)
    if chosen.by:
        passes = {name: _gathers(config, name, chosen.by[name], -(-share // samples)) for name in NETWORKS}
        parameters = {name: getattr(counts, name) for name in NETWORKS}
        if counts.adapters:  # the base is gathered once for all that share it, or in each of their passes
            tied = ("teacher", *counts.adapters)
            by_block = chosen.by["teacher"] == "block"
            passes["teacher"] = sum(passes[name] for name in tied) if by_block else 1 + updates
            parameters |= dict.fromkeys(counts.adapters, 0)
        gathers = (2 if reduced else 4) * sum(passes[name] * parameters[name] for name in NETWORKS)
        of = {name: 4.0 * getattr(counts, name) * (updates if name == "fake_score" else 1) for name in NAMES}
        scatters = sum(of[name] for name in NAMES if name not in counts.adapters)
        reduces = {devices // among: scatters / among}
        reduces[devices] = reduces.get(devices, 0.0) + sum(of[name] for name in counts.adapters)
    else:
        gathers = scatters = 0
        reduces = {devices: 4.0 * (counts.generator + updates * counts.fake_score)}
    traffic = {
        "gathering weights": gathers * (among - 1) / among,
        "scattering gradients": scatters * (among - 1) / among,
        "summing gradients": sum(2 * size * (copies - 1) / copies for copies, size in reduces.items()),
    }
    operations = None if work is None else work.step(config) * share
    computing = None if operations is None or ceilings.operations is None else operations / ceilings.operations
    received = sum(traffic.values())
    network = 0.0 if not received else None if ceilings.bytes is None else received / ceilings.bytes
    seconds = {
        "computing": computing,
        "network": network,
        "a step, at least": None if computing is None or network is None else max(computing, network),
    }
    held = memory(
        counts,
        config,
        mode,
        devices,
        reduced=reduced,
        gather=chosen.by,
        shard_group=shard_group,
        activations=activations or 0.0,
    )
    host = sum(offloaded(counts, config, mode, devices, reduced=reduced, shard_group=shard_group).values())
    return Footprint(mode, devices, held, traffic, seconds, chosen, host)


def _gathers(config: EMDConfig, name: str, gather: str, pieces: int) -> int:
    """How often a step gathers each parameter of a network.

    Args:
        name: "generator", "teacher" or "fake_score".
        gather: "phase" or "block".
        pieces: micro-batches of a device.
    """
    updates = config.fake_score_updates
    if gather == "phase":
        return 1 if name == "teacher" else 1 + updates
    k = config.langevin_steps if config.objective == "emd" else 1
    scores = 2 * k if config.objective == "sid" else k  # sid's gradient goes back through both
    if name == "teacher":
        return pieces * (0 if config.adapter.score_passes == "joint" else scores)
    if name == "fake_score":  # an update has a forward and a backward pass
        return pieces * (scores + 2 * updates)
    moves_z = config.objective == "emd" and config.gamma_z != 0
    chain = (2 * k + 2 * (config.sampling == "x_z")) if moves_z else 1
    earlier = (1 + updates) * (config.calls - 1)
    m_step = 2
    return pieces * (chain + earlier + updates + m_step)


@dataclass(frozen=True)
class Plan:
    """Requirements of the selected mode and of the others that these devices allow.

    Args:
        chosen: the selected mode; reason: why it was selected.
        others: the other modes.
        activations_known: whether the memory of activations is included.
        by_block: the selected mode with every network gathered by block, where it is not so.
    """

    chosen: Footprint
    others: tuple[Footprint, ...]
    reason: str
    activations_known: bool
    by_block: Footprint | None = None

    def table(self) -> str:
        """Formats the plan as text, with a column for each mode."""
        columns = (self.chosen, *self.others)
        largest = max(column.total for column in columns)
        unit, size = ("GiB", GIB) if largest >= GIB else ("MiB", 2**20)

        def cells(values: list[float]) -> list[str]:
            return [f"{value / size:.2f}" for value in values]

        rows = [["", *(f"{c.mode}{' *' if c is self.chosen else ''}" for c in columns)]]
        for name in self.chosen.memory:
            values = cells([c.memory[name] for c in columns])
            rows.append([name, *(["not known"] * len(columns) if self._unknown(name) else values)])
        rows.append(["a device, in all", *cells([c.total for c in columns])])
        if any(c.host for c in columns):
            rows.append(["the host, for a device", *cells([c.host for c in columns])])
        for name in NETWORKS:
            if any(c.gather.by for c in columns):
                rows.append([f"{name} is gathered by", *(c.gather.by.get(name, "-") for c in columns)])
        for name in self.chosen.traffic:
            rows.append([f"{name}, a step", *cells([c.traffic[name] for c in columns])])
        for name in self.chosen.seconds:
            rows.append([f"{name}, seconds", *(_seconds(c.seconds[name]) for c in columns)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        devices = f"{self.chosen.devices} device{'s' if self.chosen.devices > 1 else ''}"
        head = [f"{devices}, {unit} on each; * {self.reason}"]
        if self.chosen.gather.by:
            head.append(f"gather: {self.chosen.gather.reason}")
        return "\n".join([*head, *lines])

    def _unknown(self, name: str) -> bool:
        return name == "activations" and not self.activations_known

    def check(self, available: float) -> None:
        """Checks that the selected mode fits into `available` bytes per device.

        Raises:
            ConfigError: it does not fit; the message names the flag that helps.
        """
        if self.chosen.total <= available:
            return
        need = f"{gib(self.chosen.total)} GiB a device, and there are {gib(available)}"
        smaller = min(self.others, key=lambda other: other.total, default=self.chosen)
        by_phase = ""
        if self.by_block is not None and self.by_block.total <= available:
            by_phase = " with gather = 'phase'"
            helps = f"--gather block, which needs {gib(self.by_block.total)}"
        elif smaller.total <= available:
            helps = f"--parallel {smaller.mode}, which needs {gib(smaller.total)}"
        elif self.chosen.memory["activations"] > available / 2:
            helps = "a smaller --micro-batch-size, or --activation-checkpointing true"
        elif self.chosen.memory["optimizer"] > available / 4:
            helps = "more devices, or --optimizer-name adamw_8bit"
        else:
            helps = "more devices"
        raise ConfigError(f"parallel = {self.chosen.mode!r}{by_phase} needs {need}: try {helps}")


def plan(
    counts: ParameterCounts,
    config: EMDConfig,
    *,
    devices: int = 0,
    reduced: bool = False,
    activations: float | None = None,
    work: Work | None = None,
    ceilings: Ceilings = UNKNOWN,
    available: float | None = None,
) -> Plan:
    """Plans every parallel mode that the devices allow, and selects the configured one.

    Args:
        counts, config, reduced, work, ceilings, available: as for `estimate`.
        devices: number of devices; that of the process group when 0.
        activations: bytes of activations per sample in the M-step, None if not known. Of several
            sizes, those of the largest.

    Raises:
        ConfigError: fewer samples than devices, or numbers of samples with which networks cannot be
            gathered by block.
        GroupError: shard groups that do not make up the devices.
    """
    devices = devices or distributed.world_size()
    if config.batch_size < devices:
        raise ConfigError(f"batch_size must be at least the number of devices, {devices}, got {config.batch_size}")
    network = counts.teacher if "generator" in counts.adapters else counts.generator
    mode, reason = quantised_base.resolve(config, network, devices)
    whole = config.adapter.base_dtype != "auto"  # on every device
    modes = ["replicate", "fsdp"] if devices > 1 and not whole else ["replicate"]
    group = config.parallelism.shard_group or (distributed.local_size() if distributed.world_size() == devices else 0)
    if mode == "hybrid":
        distributed.check_group(devices, group)
    if len(modes) > 1 and group and 1 < group < devices and devices % group == 0:
        modes.append("hybrid")
    estimated = functools.partial(
        estimate,
        counts,
        devices=devices,
        reduced=reduced,
        shard_group=group,
        activations=activations,
        work=work,
        ceilings=ceilings,
        available=available,
    )
    made = {each: estimated(config, each) for each in dict.fromkeys([mode, *modes])}
    chosen, by_block = made.pop(mode), None
    check_passes(config, chosen.gather, devices)
    if "phase" in chosen.gather.by.values():
        by_block = estimated(
            dataclasses.replace(config, parallelism=dataclasses.replace(config.parallelism, gather="block")), mode
        )
    return Plan(chosen, tuple(made.values()), reason, activations is not None, by_block)


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"
