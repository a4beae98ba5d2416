"""Plans memory, network traffic and time of a run per device, before anything is allocated.

Weights, gradients, optimizer state, average and gathered copies are computed from the sizes of the
networks. The memory of activations depends on networks and kernels, and the speed of devices and
network on the machine. Both are arguments; without them the plan says "not known".
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from emd_fast import distributed
from emd_fast.config import ConfigError, EMDConfig
from emd_fast.run.sizes import Sizes, Work
from emd_fast.train import quantised_base
from emd_fast.train.adapters import NAMES

GIB = 2**30
# Per parameter: two moments; in 8 bits, with a scale for each 256 values.
_OPTIMIZER_BYTES = {"adamw": 8.0, "apex_adamw": 8.0, "adamw_8bit": 2.03}


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
    """

    mode: str
    devices: int
    memory: dict[str, float]
    traffic: dict[str, float]
    seconds: dict[str, float | None]

    @property
    def total(self) -> float:
        return sum(self.memory.values())


def estimate(
    sizes: Sizes,
    config: EMDConfig,
    mode: str,
    devices: int,
    *,
    reduced: bool,
    shard_group: int = 0,
    activations: float = 0.0,
    work: Work | None = None,
    ceilings: Ceilings = UNKNOWN,
) -> Footprint:
    """Estimates the requirements of one parallel mode.

    Args:
        sizes: parameter counts of the networks.
        config: the distillation.
        mode: "replicate", "fsdp" or "hybrid".
        devices: number of devices.
        reduced: whether the networks compute in bfloat16.
        shard_group: number of devices that share one copy of the weights under "hybrid".
        activations: bytes of activations per sample in the M-step, of the largest of several sizes;
            0 leaves them out.
        work, ceilings: operations of the networks and peak rates, which the times follow from.
    """
    trained = sizes.generator + sizes.fake_score
    updates = config.fake_score_updates
    optimizer = _OPTIMIZER_BYTES[config.optimizer.name]
    compute = 2 if reduced else 4
    share = -(-config.batch_size // devices)
    samples = min(config.compute.micro_batch_size or share, share)
    if mode == "replicate" or devices == 1:
        among = 1
        memory = {
            "weights": 4.0 * (sizes.teacher + trained)
            - (4.0 - compute) * sizes.matmul_weights
            - (compute * sizes.quantised - sizes.quantised_bytes),
            "gradients": 4.0 * trained,
            # All gradients of a network are summed in one buffer.
            "gathered": 4.0 * max(sizes.generator, sizes.fake_score) if devices > 1 else 0.0,
        }
        gathers = scatters = 0.0
        reduces = {devices: 4.0 * (sizes.generator + updates * sizes.fake_score)}
    else:
        among = devices if mode == "fsdp" else shard_group or distributed.local_size()
        pieces = -(-share // samples)
        sharded = {name: getattr(sizes, name) for name in NAMES if name not in sizes.adapters}
        # With micro-batches the whole float32 gradient is kept until it is reduced once.
        waiting = max(sharded.values(), default=0) if pieces > 1 else sizes.largest_block
        memory = {
            "weights": (4.0 * sizes.whole + compute * sizes.teacher) / among + 4.0 * sizes.small,
            "gradients": 4.0 * sizes.whole / among + 4.0 * (waiting + sizes.small),
            # All gradients of an adapter are summed in one buffer.
            "gathered": compute * (sizes.teacher + sizes.whole)
            + 4.0 * max((getattr(sizes, name) for name in sizes.adapters), default=0),
        }
        # A network with an adapter is gathered with the teacher, once for both.
        with_teacher = sizes.teacher if sizes.adapters else 0
        gathers = compute * (sizes.teacher + sizes.whole + updates * (sizes.whole + with_teacher))
        of = {name: 4.0 * getattr(sizes, name) * (updates if name == "fake_score" else 1) for name in NAMES}
        scatters = sum(of[name] for name in sharded)
        reduces = {devices // among: scatters / among}
        reduces[devices] = reduces.get(devices, 0.0) + sum(of[name] for name in sizes.adapters)
    replicated = {name: 1 if name in sizes.adapters else among for name in NAMES}
    memory |= {
        "optimizer": sum(optimizer * getattr(sizes, name) / replicated[name] for name in NAMES),
        "average": 4.0 * sizes.generator / replicated["generator"],
        "activations": activations * samples,
    }
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
    return Footprint(mode, devices, memory, traffic, seconds)


@dataclass(frozen=True)
class Plan:
    """Requirements of the selected mode and of the others that these devices allow.

    Args:
        chosen: the selected mode; reason: why it was selected.
        others: the other modes.
        activations_known: whether the memory of activations is included.
    """

    chosen: Footprint
    others: tuple[Footprint, ...]
    reason: str
    activations_known: bool

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
        for name in self.chosen.traffic:
            rows.append([f"{name}, a step", *cells([c.traffic[name] for c in columns])])
        for name in self.chosen.seconds:
            rows.append([f"{name}, seconds", *(_seconds(c.seconds[name]) for c in columns)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        devices = f"{self.chosen.devices} device{'s' if self.chosen.devices > 1 else ''}"
        return "\n".join([f"{devices}, {unit} on each; * {self.reason}", *lines])

    def _unknown(self, name: str) -> bool:
        return name == "activations" and not self.activations_known

    def check(self, available: float) -> None:
        """Checks that the selected mode fits into `available` bytes per device.

        Raises:
            ConfigError: it does not fit; the message names the flag that helps.
        """
        if self.chosen.total <= available:
            return
        need = f"{_gib(self.chosen.total)} GiB a device, and there are {_gib(available)}"
        smaller = min(self.others, key=lambda other: other.total, default=self.chosen)
        if smaller.total <= available:
            helps = f"--parallel {smaller.mode}, which needs {_gib(smaller.total)}"
        elif self.chosen.memory["activations"] > available / 2:
            helps = "a smaller --micro-batch-size, or --activation-checkpointing true"
        elif self.chosen.memory["optimizer"] > available / 4:
            helps = "more devices, or --optimizer-name adamw_8bit"
        else:
            helps = "more devices"
        raise ConfigError(f"parallel = {self.chosen.mode!r} needs {need}: try {helps}")


def plan(
    sizes: Sizes,
    config: EMDConfig,
    *,
    devices: int = 0,
    reduced: bool = False,
    activations: float | None = None,
    work: Work | None = None,
    ceilings: Ceilings = UNKNOWN,
) -> Plan:
    """Plans every parallel mode that the devices allow, and selects the configured one.

    Args:
        sizes, config, reduced, work, ceilings: as for `estimate`.
        devices: number of devices; that of the process group when 0.
        activations: bytes of activations per sample in the M-step, None if not known. Of several
            sizes, those of the largest.

    Raises:
        ConfigError: fewer samples than devices.
        GroupError: shard groups that do not make up the devices.
    """
    devices = devices or distributed.world_size()
    if config.batch_size < devices:
        raise ConfigError(f"batch_size must be at least the number of devices, {devices}, got {config.batch_size}")
    network = sizes.teacher if "generator" in sizes.adapters else sizes.generator
    mode, reason = quantised_base.resolve(config, network, devices)
    whole = config.adapter.base_dtype != "auto"  # on every device
    modes = ["replicate", "fsdp"] if devices > 1 and not whole else ["replicate"]
    group = config.parallelism.shard_group or (distributed.local_size() if distributed.world_size() == devices else 0)
    if mode == "hybrid":
        distributed.check_group(devices, group)
    if len(modes) > 1 and group and 1 < group < devices and devices % group == 0:
        modes.append("hybrid")
    made = {
        each: estimate(
            sizes,
            config,
            each,
            devices,
            reduced=reduced,
            shard_group=group,
            activations=activations or 0.0,
            work=work,
            ceilings=ceilings,
        )
        for each in dict.fromkeys([mode, *modes])
    }
    return Plan(made.pop(mode), tuple(made.values()), reason, activations is not None)


def available(device: torch.device | str = "cpu") -> float:
    """Bytes of memory for one rank: that of its GPU, or its share of the host's."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / distributed.local_size()


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"
