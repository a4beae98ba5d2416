"""What fp8 would do to delta, simulated: e4m3 in the score passes of the E-step.

The operands of 3x3 convolutions and of linear layers are rounded to e4m3 and multiplied in the dtype
of the network. Weights have a scale per output channel, activations one per tensor. No kernel is
measured here: the question is what the rounding costs in quality.

    python -m benchmarks.fp8 delta RUN            error of delta by noise level, networks of a run
    python -m benchmarks.fp8 distil e4m3 RECIPE [OPTIONS]   `emd-fast distill` with such an E-step
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.delta_levels import levels, ratios_of, table
from emd_fast import cli
from emd_fast.em.score_difference import ScoreDifference
from emd_fast.run.distill import open_run
from emd_fast.train.trainer import EMDTrainer

ATEN = torch.ops.aten
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max
Rounding = Callable[[Tensor, tuple[int, ...] | None], Tensor]


def e4m3(x: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """Rounds to e4m3, scaled so that the largest magnitude over `dims` (all: None) is e4m3's largest."""
    largest = x.abs().amax() if dims is None else x.abs().amax(dims, keepdim=True)
    scale = E4M3_MAX / largest.double().clamp_min(1e-30)
    return ((x * scale).to(torch.float32).to(torch.float8_e4m3fn).double() / scale).to(x.dtype)


def bf16(x: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """Rounds to bfloat16, to compare with."""
    return x.bfloat16().to(x.dtype)


ROUNDINGS: dict[str, Rounding] = {"bf16": bf16, "e4m3": e4m3}


class RoundedOperands(TorchDispatchMode):
    """Rounds the operands of 3x3 convolutions and of matrix products of linear layers.

    Attributes:
        rounded: how many products were rounded.
    """

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding, self.rounded = rounding, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = list(args)
        if func is ATEN.convolution.default and tuple(args[1].shape[2:]) == (3, 3):
            args[:2] = self._rounded(args[0], args[1], (1, 2, 3))
        elif func in (ATEN.mm.default, ATEN.addmm.default):
            args[-2:] = self._rounded(args[-2], args[-1], (0,))
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor, weight: Tensor, dims: tuple[int, ...]) -> list[Tensor]:
        self.rounded += 1
        return [self.rounding(x, None), self.rounding(weight, dims)]


@torch.no_grad()
def delta_errors(trainer: EMDTrainer, samples: int, ratios: Tensor) -> list[dict[str, float]]:
    """Compares delta with rounded operands with that without, on the generator's diffused samples.

    Args:
        trainer: its networks are not fused.
        samples: number of samples at each noise level.
        ratios: (n,) noise levels sigma / alpha.

    Raises:
        ValueError: the networks are fused.

    Returns:
        For each level, its log-SNR, the RMS of delta over that of the teacher's score, and for each
        rounding the mean cosine and the RMS error over the RMS of delta.
    """
    if trainer.config.compute.fuse:
        raise ValueError("fused ops cannot be rounded: distil the run with --fuse false")
    rows = []
    for level in levels(trainer, samples, ratios):
        row, difference = level.row, level.difference(trainer.teacher, trainer.fake_score)
        for name, rounding in ROUNDINGS.items():
            with RoundedOperands(rounding):
                found = difference.at(level.x)
            row |= {f"{name} cosine": level.cosine(found), f"{name} error": level.error(found)}
        rows.append(row)
    return rows


def distil(rounding: Rounding, arguments: list[str]) -> int:
    """Runs `emd-fast distill` with rounded operands in the score passes of its E-steps."""
    outputs = ScoreDifference.outputs

    def rounded(self: ScoreDifference, x: Tensor) -> list[Tensor]:
        with RoundedOperands(rounding):
            return outputs(self, x)

    ScoreDifference.outputs = rounded  # type: ignore[method-assign]
    return cli.main(["distill", *arguments, "--fuse", "false"])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    delta = commands.add_parser("delta")
    delta.add_argument("run", type=Path)
    delta.add_argument("--samples", type=int, default=256)
    distilled = commands.add_parser("distil")
    distilled.add_argument("rounding", choices=list(ROUNDINGS))
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "distil":
        return distil(ROUNDINGS[chosen.rounding], rest)
    _, _, trainer = open_run(chosen.run, trains=True)
    print(table(delta_errors(trainer, chosen.samples, ratios_of(trainer))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
