"""What a quantised base does to delta: error by noise level, of a run with adapters.

The adapters are those of the run, trained on the base as it came. Teacher and fake score get the
same rounded weights in their linear layers. "int8, teacher alone" rounds the teacher and leaves the
base of the fake score as it is: nothing cancels there.

    emd-fast distill digits --adapter-rank 8 --out RUN
    python -m benchmarks.quantised_base RUN
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.delta_levels import levels, ratios_of, table
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.fusion.fusing import unfuse
from emd_fast.run.distill import open_run
from emd_fast.train import adapters
from emd_fast.train.quantised_base import QuantisedLinear, quantised
from emd_fast.train.trainer import EMDTrainer

FORMATS = ("int8", "fp8", "nf4")


def rounded(denoiser: Denoiser, weights: dict[str, Tensor]) -> Denoiser:
    """Returns a copy, with an adapter or without, whose linear layers have these weights by name."""
    copied = copy.deepcopy(denoiser)
    for name, weight in weights.items():
        layer: Any = copied.get_submodule(name)
        getattr(layer, "base_layer", layer).weight = nn.Parameter(weight, requires_grad=False)
    return copied


def weights_of(teacher: Denoiser) -> dict[str, dict[str, Tensor]]:
    """By format: the rounded weights of the layers that are quantised, in bfloat16 too."""
    found = {name: _quantised_weights(teacher, name) for name in FORMATS}
    return {"bf16": {name: w.bfloat16().to(w.dtype) for name, w in _own(teacher, found["int8"]).items()}, **found}


def _quantised_weights(teacher: Denoiser, base_dtype: str) -> dict[str, Tensor]:
    made = quantised(teacher, base_dtype)
    return {name: m.weight.detach() for name, m in made.named_modules() if isinstance(m, QuantisedLinear)}


def _own(teacher: Denoiser, names: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: teacher.get_parameter(f"{name}.weight").detach() for name in names}


@torch.no_grad()
def delta_errors(trainer: EMDTrainer, samples: int, ratios: Tensor) -> list[dict[str, float]]:
    """Compares delta on a rounded base with that on the base as it is, on the generator's diffused samples.

    Args:
        trainer: float32, with an adapter on an unquantised base for the fake score. It is unfused.
        samples: number of samples at each noise level.
        ratios: (n,) noise levels sigma / alpha.

    Raises:
        ValueError: a trainer without such an adapter.

    Returns:
        For each level, its log-SNR, the RMS of delta over that of the teacher's score, and for each
        format the RMS error over the RMS of delta.
    """
    if not adapters.has_adapter(trainer.fake_score) or trainer.config.adapter.base_dtype != "auto":
        raise ValueError("the run needs adapters on a base as it came: --adapter-rank 8, base_dtype left out")
    for network in (trainer.teacher, trainer.fake_score):
        unfuse(network)
    changed = {}
    for name, weights in weights_of(trainer.teacher).items():
        changed[f"{name} error"] = rounded(trainer.teacher, weights), rounded(trainer.fake_score, weights)
        if name == "int8":
            alone = changed[f"{name} error"][0], trainer.fake_score
    changed["int8, teacher alone"] = alone
    rows = []
    for level in levels(trainer, samples, ratios):
        errors = {name: level.error(level.difference(*pair).at(level.x)) for name, pair in changed.items()}
        rows.append(level.row | errors)
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantised_base", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=256)
    chosen = parser.parse_args(arguments)
    _, _, trainer = open_run(chosen.run, trains=True)
    layers = weights_of(trainer.teacher)["int8"].values()
    count = sum(p.numel() for p in trainer.teacher.parameters())
    print(f"{sum(w.numel() for w in layers):,} of {count:,} weights in {len(layers)} linear layers\n")
    print(table(delta_errors(trainer, chosen.samples, ratios_of(trainer))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
