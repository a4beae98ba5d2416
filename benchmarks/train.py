"""Training of a whole network with random weights, by EMDTrainer as users run it.

    python -m benchmarks.train adm sd15 --seconds 440 --json train.json

For each network: images a second, the share of this device's own rate of matrix products (MFU), peak memory, and where
the time goes. The micro-batch is the largest that `emd_fast.run.plan` finds room for.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import emd_fast
from benchmarks.harness import ceiling, machine
from benchmarks.harness.command import device_named
from benchmarks.networks import KINDS, Kind, denoiser
from emd_fast import Denoiser, EMDConfig, EMDTrainer
from emd_fast.config import ConfigError
from emd_fast.io.files import write_text
from emd_fast.reporting.progress import summary
from emd_fast.run.plan import GIB, Sizes, available, plan
from emd_fast.train import throughput

SCHEMA = 1
BATCHES = {"small": 128, "adm": 64, "sd15": 16}
_ROOM = 0.8  # of the memory: what a plan does not know of is the workspace of convolutions and what lies between them
_PROMPTS = 64  # conditions to draw from, of a network that takes text
_LINES = 5  # about the steps of one network


@dataclass(frozen=True)
class Trained:
    """What was seen of one network, or why nothing was. Seconds and rates are of one step, at the median.

    Attributes:
        planned_bytes, peak_bytes: what `emd_fast.run.plan` foresaw; the most that was held.
        flops: of one step, as `emd_fast.train.throughput` counts them;
        mfu: their rate over that of a large matrix product.
        shares: of the time, by the parts of a step.
        skipped: updates with a gradient that was not finite.
    """

    network: str
    why: str | None = None
    parameters: int = 0
    batch: int = 0
    micro_batch: int = 0
    langevin_steps: int = 0
    student_updates: int = 0
    fused: bool = False
    compute_dtype: str = ""
    wanted: int = 0
    steps: int = 0
    seconds: float = 0.0
    images_per_second: float = 0.0
    flops: float = 0.0
    flops_per_second: float = 0.0
    mfu: float = 0.0
    planned_bytes: float = 0.0
    peak_bytes: float = 0.0
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: int = 0

    def line(self) -> str:
        if self.why is not None:
            return f"{self.network}: not trained: {self.why}"
        cut = "" if self.steps == self.wanted else f" (the time was up; {self.wanted} were asked for)"
        row = {
            "images_per_second": self.images_per_second,
            "tflops": self.flops_per_second / 1e12,
            "mfu": self.mfu,
            "memory_gib": self.peak_bytes / GIB,
            **self.shares,
        }
        return (
            f"{self.network}: {self.parameters / 1e6:.1f} million parameters, {self.compute_dtype}"
            f"{', fused' if self.fused else ''}, batch {self.batch} by {self.micro_batch}, K = {self.langevin_steps}, "
            f"{self.student_updates} student updates: {self.steps} steps{cut}, {self.seconds:.3g} s a step, "
            f"{summary(row)}; planned {self.planned_bytes / GIB:.3g} GiB"
        )


def train(name: str, options: argparse.Namespace, device: torch.device, rate: float, deadline: float) -> Trained:
    """Steps of one network until they are done or the time is up.

    Args:
        rate: operations a second of a large matrix product here; deadline: of time.monotonic.
    """
    micro = options.micro_batch
    while True:
        try:
            return _train(name, micro, options, device, rate, deadline)
        except ConfigError as error:
            return Trained(name, why=str(error))
        except _TooMuch as error:
            micro = error.micro_batch // 2
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not micro:
            return Trained(name, why="out of memory with one sample at a time")
        print(f"{name}: out of memory; again with micro-batches of {micro}", flush=True)


class _TooMuch(Exception):
    def __init__(self, micro_batch: int) -> None:
        super().__init__()
        self.micro_batch = micro_batch


def _train(
    name: str, micro: int, options: argparse.Namespace, device: torch.device, rate: float, deadline: float
) -> Trained:
    kind = KINDS[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    teacher = denoiser(kind, 0, device)
    if options.fuse:
        emd_fast.fuse(teacher)
    config, planned = _planned(name, kind, teacher, micro, options, device)
    try:
        trainer = EMDTrainer(teacher, config, prompts=_prompts(kind))
        # The first step is not timed: kernels are chosen and compiled in it, and its operations counted.
        _, flops = throughput.counted(trainer.step)
        seconds, laps = _steps(name, trainer, options.steps, deadline)
    except torch.OutOfMemoryError:
        # The error itself would hold the frames, and these the networks.
        raise _TooMuch(config.micro_batch_size) from None
    if not seconds:
        return Trained(name, why="the time was up before its first timed step")
    step = statistics.median(seconds)
    return Trained(
        network=name,
        parameters=sum(p.numel() for p in teacher.parameters()),
        batch=config.batch_size,
        micro_batch=config.micro_batch_size,
        langevin_steps=config.langevin_steps,
        student_updates=config.student_updates,
        fused=options.fuse,
        compute_dtype=str(trainer.compute_dtype).removeprefix("torch."),
        wanted=options.steps,
        steps=len(seconds),
        seconds=step,
        images_per_second=config.batch_size / step,
        flops=flops,
        flops_per_second=flops / step,
        mfu=flops / step / rate,
        planned_bytes=planned,
        peak_bytes=throughput.peak_memory(device),
        shares=throughput.shares(laps),
        skipped=int(trainer.skipped),
    )


def _planned(
    name: str, kind: Kind, teacher: Denoiser, micro: int, options: argparse.Namespace, device: torch.device
) -> tuple[EMDConfig, float]:
    """The configuration with the largest micro-batch (batch, a half, a quarter ...) that there is room for, or with the
    one that was asked for; and the bytes that it needs.

    Raises:
        ConfigError: not even one sample at a time fits.
    """
    batch = options.batch or BATCHES[name]
    sizes, each, room = Sizes.of(teacher, teacher, teacher), activations(teacher, kind, device), available(device)
    size = micro or batch
    while True:
        config = EMDConfig(
            steps=options.steps + 1,
            batch_size=batch,
            micro_batch_size=size,
            langevin_steps=options.langevin_steps,
            num_classes=kind.classes,
            fuse=options.fuse,
            precision="bfloat16",
            gamma_z=0.01,
            generator_lr=1e-5,
            student_lr=1e-5,
        )
        made = plan(sizes, config, devices=1, reduced=True, activations=each)
        if micro or made.chosen.total <= _ROOM * room:
            return config, made.chosen.total
        if size == 1:
            made.check(_ROOM * room)
        size //= 2


def activations(network: Denoiser, kind: Kind, device: torch.device) -> float:
    """Bytes that one more sample makes a pass keep for the gradient of the weights, in bfloat16."""

    def kept(samples: int) -> int:
        storages: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        x, t = torch.randn(samples, *kind.sample_shape, device=device), torch.ones(samples, device=device)
        with saved_tensors_hooks(note, lambda x: x), torch.autocast(device.type, torch.bfloat16):
            output = network(x, t, kind.condition(samples, device))
        assert output.requires_grad  # and it is held until here, so that no address is given away twice
        return sum(storages.values())

    return float(kept(2) - kept(1))


def _prompts(kind: Kind) -> Tensor | None:
    return kind.condition(_PROMPTS, torch.device("cpu")) if kind.text else None


def _steps(name: str, trainer: EMDTrainer, steps: int, deadline: float) -> tuple[list[float], dict[str, float]]:
    """Seconds of each step, as many as there is time for, and those of their parts in all."""
    seconds: list[float] = []
    parts: dict[str, float] = {}
    every = -(-steps // _LINES)
    _finished(trainer)
    began = time.monotonic()
    while len(seconds) < steps and time.monotonic() + max(seconds, default=0.0) < deadline:
        metrics = trainer.step()
        _finished(trainer)
        now = time.monotonic()
        seconds.append(now - began)
        began = now
        for part, value in trainer.laps.seconds().items():
            parts[part] = parts.get(part, 0.0) + value
        if len(seconds) % every == 0:
            losses = ", ".join(f"{key} {metrics[key].item():.3g}" for key in ("generator_loss", "student_loss"))
            print(f"{name}: step {len(seconds)} of {steps}, {seconds[-1]:.3g} s, {losses}", flush=True)
    return seconds, parts


def _finished(trainer: EMDTrainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code: 1 where a network was not trained."""
    options = _parser().parse_args(arguments)
    try:
        device = device_named(options.device)
        if options.json and not options.json.parent.is_dir():
            raise ConfigError(f"{options.json} cannot be written: there is no folder {options.json.parent}")
    except (ConfigError, RuntimeError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 2
    end = time.monotonic() + options.seconds
    before = machine.clocks(device)
    rate = ceiling.multiplied(device, torch.bfloat16, rounds=20)
    print(f"{machine.hardware(device).get('gpu', 'CPU')}: {rate / 1e12:.4g} TFLOP/s in a large bfloat16 product")
    found: list[Trained] = []
    for left, name in zip(range(len(options.networks), 0, -1), options.networks, strict=True):
        now = time.monotonic()
        found.append(train(name, options, device, rate, now + (end - now) / left))
        print(found[-1].line(), flush=True)
        if options.json:  # after every network: a run that is cut short leaves what it has
            _write(options, device, rate, before, found)
    return 1 if any(one.why for one in found) else 0


def _write(
    options: argparse.Namespace, device: torch.device, rate: float, before: dict[str, str] | None, found: list[Trained]
) -> None:
    """The head is that of `emd-fast bench --json`."""
    facts: dict[str, Any] = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": machine.hardware(device),
        "software": machine.software(device),
        "clocks": {"before": before, "after": machine.clocks(device)},
        "commit": machine.commit(),
        "settings": {"device": device.type, "threads": torch.get_num_threads(), "seconds": options.seconds},
        "matmul_flops_per_second": rate,
        "training": [dataclasses.asdict(one) for one in found],
        "schema": SCHEMA,
    }
    write_text(options.json, f"{json.dumps(facts, indent=1)}\n")


def read(path: Path) -> list[Trained]:
    """The networks of a file of --json; none where it is no such file."""
    try:
        return [Trained(**one) for one in json.loads(path.read_text())["training"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _parser() -> argparse.ArgumentParser:
    def count(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return value

    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", choices=tuple(KINDS), metavar="NETWORK", help=", ".join(KINDS))
    parser.add_argument("--steps", type=count, default=50, help="timed steps of each network (default 50)")
    parser.add_argument("--batch", type=count, help="samples in a step (default: by network)")
    parser.add_argument("--micro-batch", type=count, default=0, help="samples at a time (default: what fits)")
    parser.add_argument("--langevin-steps", type=count, default=8, help="K (default 8)")
    parser.add_argument("--seconds", type=float, default=440.0, help="for everything; steps end when they are over")
    parser.add_argument("--no-fuse", dest="fuse", action="store_false", help="the networks as they are")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; a GPU where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything about the run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
