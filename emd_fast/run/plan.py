"""What a run will need of each device, before anything is allocated: memory, bytes over the network, and time.

Weights, gradients, optimizer, average and gathered copies follow from the sizes of the networks and are counted. What
activations take depends on the network and its kernels, and how fast a device and a network are on the machines: these
are asked for, and "not known" where nobody said.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from emd_fast import distributed
from emd_fast.config import ConfigError, EMDConfig
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.train.cast_weights import weights_of_products

GIB = 2**30
_OPTIMIZER_BYTES = {"adamw": 8.0, "apex_adamw": 8.0, "adamw_8bit": 2.03}  # two moments; 8 bits and a scale for 256


@dataclass(frozen=True)
class Sizes:
    """Parameters of the three networks; a teacher that is a formula has 0.

    Args:
        largest_block: of the generator's and the student's.
        products: those of the teacher that a bfloat16 run holds rounded where it does not shard
            (`emd_fast.train.cast_weights`).
    """

    teacher: int
    generator: int
    student: int
    largest_block: int
    products: int = 0

    @classmethod
    def of(cls, teacher: nn.Module, generator: nn.Module, student: nn.Module) -> Sizes:
        """Of networks on any device, the meta device too."""
        blocks = [_count(block) for network in (generator, student) for block in distributed.blocks_of(network)]
        counts = [_count(network) for network in (teacher, generator, student)]
        products = sum(p.numel() for p in weights_of_products(teacher))
        return cls(counts[0], counts[1], counts[2], max(blocks, default=max(counts)), products)


def _count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@dataclass(frozen=True)
class Work:
    """Floating-point operations of a forward pass of one sample through each network."""

    teacher: float
    generator: float
    student: float

    @classmethod
    def of(cls, teacher: Denoiser, generator: nn.Module, student: Denoiser, classes: int = 0) -> Work:
        """Of the matrix products, convolutions and attention that PyTorch knows of, from the shapes alone.

        Args:
            classes: whether the condition is a label.

        Raises:
            RuntimeError: a network that looks at values, which only a real pass would tell.
        """
        shape = tuple(teacher.sample_shape or ())
        latent = getattr(generator, "latent_shape", None) or shape
        cond = torch.zeros(1, dtype=torch.int64) if classes else None
        x, z, t = torch.zeros(1, *shape), torch.zeros(1, *latent), torch.ones(1)
        return cls(_operations(teacher, x, t, cond), _operations(generator, z, cond), _operations(student, x, t, cond))

    def step(self, config: EMDConfig) -> float:
        """Of one sample in a step. A backward pass counts as one forward pass to the input alone (the Langevin steps
        in z), as two with the weights, as three where activations are computed again; attention, whose backward pass
        needs more, counts as everything else."""
        k = 1 if config.objective == "vsd" else config.langevin_steps
        moves_z = config.objective != "vsd" and config.gamma_z != 0
        learning = 4 if config.activation_checkpointing else 3
        student = config.student_updates * (self.generator + learning * self.student)
        scores = k * ((1 if config.guidance is None else 2) * self.teacher + self.student)
        if config.sampling == "x_z":
            generated = 2 * (k + 1) * self.generator
        else:
            generated = (2 * k if moves_z else 1) * self.generator
        return student + scores + generated + learning * self.generator


def _operations(network: nn.Module, *arguments: Tensor | None) -> float:
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    # On the meta device shapes are all there is; a formula without parameters is cheap enough to compute.
    device = "meta" if any(True for _ in network.parameters()) else "cpu"
    moved = {name: tensor.detach().to(device) for name, tensor in tensors.items()}
    given = tuple(None if argument is None else argument.to(device) for argument in arguments)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(network, moved, given)
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Ceilings:
    """What the hardware does at best, as its owner says; None where nobody said.

    Args:
        operations: floating-point operations a second of a device, in the compute dtype.
        bytes: that a device receives over the network in a second.
    """

    operations: float | None = None
    bytes: float | None = None


UNKNOWN = Ceilings()


@dataclass(frozen=True)
class Footprint:
    """One mode on so many devices.

    Args:
        memory: bytes on each device, by what they are for; those of the fullest moment of a step.
        traffic: bytes that each device receives in a step, by what they are for.
        seconds: of a step at the ceilings, None where not known: what cannot be undercut, not what will be seen.
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
    """What a mode needs.

    Args:
        mode: "replicate", "fsdp" or "hybrid".
        reduced: whether the networks compute in bfloat16.
        shard_group: devices that hold one copy together under "hybrid".
        activations: bytes of one sample in the M-step, where they are known.
        work, ceilings: what the time of a step is told from.
    """
    trained = sizes.generator + sizes.student
    updates = config.student_updates
    optimizer = _OPTIMIZER_BYTES[config.optimizer]
    compute = 2 if reduced else 4
    share = -(-config.batch_size // devices)
    samples = min(config.micro_batch_size or share, share)
    if mode == "replicate" or devices == 1:
        among = 1
        memory = {
            "weights": 4.0 * (sizes.teacher + trained) - (4.0 - compute) * sizes.products,
            "gradients": 4.0 * trained,
            # One buffer of all gradients of a network, while they are summed.
            "gathered": 4.0 * max(sizes.generator, sizes.student) if devices > 1 else 0.0,
        }
        gathers = scatters = 0.0
        reduces = 4.0 * (sizes.generator + updates * sizes.student)
        copies = devices
    else:
        among = devices if mode == "fsdp" else shard_group or distributed.local_size()
        copies = devices // among
        pieces = -(-share // samples)
        # Between micro-batches the whole gradient waits in float32 for the one reduction.
        waiting = max(sizes.generator, sizes.student) if pieces > 1 else sizes.largest_block
        memory = {
            "weights": (4.0 * trained + compute * sizes.teacher) / among,
            "gradients": 4.0 * trained / among + 4.0 * waiting,
            "gathered": float(compute * (sizes.teacher + trained)),
        }
        gathers = compute * (sizes.teacher + trained + updates * trained)
        scatters = 4.0 * (sizes.generator + updates * sizes.student)
        reduces = scatters / among
    memory |= {
        "optimizer": optimizer * trained / among,
        "average": 4.0 * sizes.generator / among,
        "activations": activations * samples,
    }
    traffic = {
        "gathering weights": gathers * (among - 1) / among,
        "scattering gradients": scatters * (among - 1) / among,
        "summing gradients": 2 * reduces * (copies - 1) / copies,
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
    """The modes that there are on these devices, and the one that is taken."""

    chosen: Footprint
    others: tuple[Footprint, ...]
    reason: str
    activations_known: bool

    def table(self) -> str:
        """For people: a column for each mode."""
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
        """Whether it fits into so many bytes a device.

        Raises:
            ConfigError: it cannot, and which flag would help.
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
            helps = "more devices, or --optimizer adamw_8bit"
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
    """What every mode needs on so many devices (those of the process group when 0), and which one is taken.

    Raises:
        ConfigError: fewer samples than devices. GroupError: groups that do not make up the devices.
    """
    devices = devices or distributed.world_size()
    if config.batch_size < devices:
        raise ConfigError(f"batch_size must be at least the number of devices, {devices}, got {config.batch_size}")
    mode, reason = distributed.resolve(config.parallel, sizes.generator, devices)
    modes = ["replicate", "fsdp"] if devices > 1 else ["replicate"]
    group = config.shard_group or (distributed.local_size() if distributed.world_size() == devices else 0)
    if mode == "hybrid":
        distributed.check_group(devices, group)
    if devices > 1 and group and 1 < group < devices and devices % group == 0:
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
    """Bytes of memory that one rank may count on: its GPU's, or its share of the host's."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / distributed.local_size()


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}"
