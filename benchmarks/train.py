"""Training throughput of whole networks with random weights under EMDTrainer.

    python -m benchmarks.train adm sd15 --seconds 440 --json train.json

Reports for each network: images per second, MFU (relative to a large matmul on the same device), peak
memory, and the share of time of each phase. The micro-batch is the largest that fits according to
`emd_fast.run.plan`.
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
from benchmarks.networks import NETWORKS, NetworkSpec, denoiser
from emd_fast import Denoiser, EMDConfig, EMDTrainer
from emd_fast.config import ConfigError
from emd_fast.io.files import write_text
from emd_fast.reporting.progress import summary
from emd_fast.run.plan import plan
from emd_fast.train import throughput
from emd_fast.train.memory import GIB, available
from emd_fast.train.parameter_counts import ParameterCounts

SCHEMA = 1
BATCHES = {"small": 128, "adm": 64, "sd15": 16}
_MEMORY_SHARE = 0.8  # a plan does not count convolution workspaces and allocator fragmentation
_PROMPTS = 64  # text conditions to draw from
_LINES = 5  # progress lines per network


@dataclass(frozen=True)
class TrainingResult:
    """Measurements of one network, or the reason why there are none (`why`).

    Attributes:
        seconds: the median time of a step; all rates derive from it.
        planned_bytes: memory that `emd_fast.run.plan` predicted.
        peak_bytes: peak memory.
        flops: of one step, as `emd_fast.train.throughput` counts them.
        mfu: the FLOP rate relative to that of a large matmul.
        shares: fraction of the time by phase of a step.
        skipped: updates skipped because of a gradient that is not finite.
    """

    network: str
    why: str | None = None
    parameters: int = 0
    batch: int = 0
    micro_batch: int = 0
    langevin_steps: int = 0
    fake_score_updates: int = 0
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
            f"{self.fake_score_updates} fake-score updates: {self.steps} steps{cut}, {self.seconds:.3g} s a step, "
            f"{summary(row)}; planned {self.planned_bytes / GIB:.3g} GiB"
        )


def train(name: str, options: argparse.Namespace, device: torch.device, rate: float, deadline: float) -> TrainingResult:
    """Trains one network until all steps are done or the time is up.

    Args:
        rate: FLOP/s of a large matmul on this device.
        deadline: a value of time.monotonic().
    """
    micro = options.micro_batch
    while True:
        try:
            return _train(name, micro, options, device, rate, deadline)
        except ConfigError as error:
            return TrainingResult(name, why=str(error))
        except _OutOfMemory as error:
            micro = error.micro_batch // 2
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not micro:
            return TrainingResult(name, why="out of memory with one sample at a time")
        print(f"{name}: out of memory; again with micro-batches of {micro}", flush=True)


class _OutOfMemory(Exception):
    def __init__(self, micro_batch: int) -> None:
        super().__init__()
        self.micro_batch = micro_batch


def _train(
    name: str, micro: int, options: argparse.Namespace, device: torch.device, rate: float, deadline: float
) -> TrainingResult:
    kind = NETWORKS[name]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    teacher = denoiser(kind, 0, device)
    if options.fuse:
        emd_fast.fuse(teacher)
    config, planned = _configured(name, kind, teacher, micro, options, device)
    try:
        trainer = EMDTrainer(teacher, config, prompts=_prompts(kind))
        # The first step is not timed: it compiles kernels and counts FLOPs.
        _, flops = throughput.counted(trainer.step)
        seconds, parts = _steps(name, trainer, options.steps, deadline)
    except torch.OutOfMemoryError:
        # A chained error would keep the frames alive, and with them the networks.
        raise _OutOfMemory(config.compute.micro_batch_size) from None
    if not seconds:
        return TrainingResult(name, why="the time was up before its first timed step")
    step = statistics.median(seconds)
    return TrainingResult(
        network=name,
        parameters=sum(p.numel() for p in teacher.parameters()),
        batch=config.batch_size,
        micro_batch=config.compute.micro_batch_size,
        langevin_steps=config.langevin_steps,
        fake_score_updates=config.fake_score_updates,
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
        shares=throughput.shares(parts),
        skipped=int(trainer.skipped),
    )


def _configured(
    name: str, kind: NetworkSpec, teacher: Denoiser, micro: int, options: argparse.Namespace, device: torch.device
) -> tuple[EMDConfig, float]:
    """Returns the configuration and the bytes that it needs.

    The micro-batch is `micro` if given, otherwise the largest of batch, batch / 2, ... that fits.

    Raises:
        ConfigError: even a micro-batch of one sample does not fit.
    """
    batch = options.batch or BATCHES[name]
    counts, room = ParameterCounts.of(teacher, teacher, teacher), available(device)
    each = activations(teacher, kind, device)
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
            fake_score_lr=1e-5,
        )
        made = plan(counts, config, devices=1, reduced=True, activations=each)
        if micro or made.chosen.total <= _MEMORY_SHARE * room:
            return config, made.chosen.total
        if size == 1:
            made.check(_MEMORY_SHARE * room)
        size //= 2


def activations(network: Denoiser, kind: NetworkSpec, device: torch.device) -> float:
    """Returns the activation bytes per sample that a bf16 pass saves for the weight gradient."""

    def kept(samples: int) -> int:
        storages: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        x, t = torch.randn(samples, *kind.sample_shape, device=device), torch.ones(samples, device=device)
        with saved_tensors_hooks(note, lambda x: x), torch.autocast(device.type, torch.bfloat16):
            output = network(x, t, kind.condition(samples, device))
        assert output.requires_grad  # holding the output keeps all storages alive, so addresses are unique
        return sum(storages.values())

    return float(kept(2) - kept(1))


def _prompts(kind: NetworkSpec) -> Tensor | None:
    return kind.condition(_PROMPTS, torch.device("cpu")) if kind.text else None


def _steps(name: str, trainer: EMDTrainer, steps: int, deadline: float) -> tuple[list[float], dict[str, float]]:
    """Runs steps until the deadline; returns seconds per step and total seconds by phase."""
    seconds: list[float] = []
    parts: dict[str, float] = {}
    every = -(-steps // _LINES)
    _synchronize(trainer)
    began = time.monotonic()
    while len(seconds) < steps and time.monotonic() + max(seconds, default=0.0) < deadline:
        metrics = trainer.step()
        _synchronize(trainer)
        now = time.monotonic()
        seconds.append(now - began)
        began = now
        for part, value in trainer.timer.seconds().items():
            parts[part] = parts.get(part, 0.0) + value
        if len(seconds) % every == 0:
            losses = ", ".join(f"{key} {metrics[key].item():.3g}" for key in ("generator_loss", "fake_score_loss"))
            print(f"{name}: step {len(seconds)} of {steps}, {seconds[-1]:.3g} s, {losses}", flush=True)
    return seconds, parts


def _synchronize(trainer: EMDTrainer) -> None:
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 1 if a network was not trained."""
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
    rate = ceiling.matmul_rate(device, torch.bfloat16, rounds=20)
    print(f"{machine.hardware(device).get('gpu', 'CPU')}: {rate / 1e12:.4g} TFLOP/s in a large bfloat16 matmul")
    found: list[TrainingResult] = []
    for left, name in zip(range(len(options.networks), 0, -1), options.networks, strict=True):
        now = time.monotonic()
        found.append(train(name, options, device, rate, now + (end - now) / left))
        print(found[-1].line(), flush=True)
        if options.json:  # written after every network, so an interrupted run keeps its results
            _write(options, device, rate, before, found)
    return 1 if any(one.why for one in found) else 0


def _write(
    options: argparse.Namespace,
    device: torch.device,
    rate: float,
    before: dict[str, str] | None,
    found: list[TrainingResult],
) -> None:
    """Writes the results under the header fields of `emd-fast bench --json`."""
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


def read(path: Path) -> list[TrainingResult]:
    """Returns the results in a --json file; an empty list for any other file."""
    try:
        return [TrainingResult(**one) for one in json.loads(path.read_text())["training"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _parser() -> argparse.ArgumentParser:
    def count(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return value

    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="+", choices=tuple(NETWORKS), metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--steps", type=count, default=50, help="timed steps of each network (default 50)")
    parser.add_argument("--batch", type=count, help="samples per step (default: by network)")
    parser.add_argument("--micro-batch", type=count, default=0, help="samples per micro-batch (default: what fits)")
    parser.add_argument("--langevin-steps", type=count, default=8, help="K (default 8)")
    parser.add_argument("--seconds", type=float, default=440.0, help="time limit for all networks (default 440)")
    parser.add_argument("--no-fuse", dest="fuse", action="store_false", help="do not fuse the networks")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if present)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
