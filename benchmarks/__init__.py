"""The bench: one file an op, which declares inputs, contenders and bytes; harness/ does everything else.

emd-fast bench langevin_eps          contenders in turn in one process: the figures that are quoted
pytest benchmarks                    the same contenders, already verified, one at a time under pytest-benchmark
"""

from __future__ import annotations

import importlib

from benchmarks.harness.declare import Bench

OPS = (
    "uniform",
    "normal",
    "perturb",
    "langevin_eps",
    "langevin_z",
    "langevin_step",
    "m_step_loss",
    "score_matching_loss",
    "group_norm",
    "attention",
)
"""What runs when no op is named."""

AROUND = ("convolution", "residual_block")
"""What lies around the norms of a network."""

WHOLE = tuple(f"{what}:{network}" for what in ("unet", "e_step") for network in ("small", "adm", "sd15"))
"""Forward passes and E-steps of whole networks."""

LOOPS = tuple(name.replace("unet:", "loop:") for name in WHOLE if name.startswith("unet:"))
"""Those networks in a loop that is not ours."""

NAMES = (*OPS, *AROUND, "training_step", *WHOLE, *LOOPS)


def load(name: str) -> Bench:
    """The declaration of one of NAMES."""
    module, _, network = name.partition(":")
    declared = importlib.import_module(f"benchmarks.{module}")
    bench: Bench = declared.bench(network) if network else declared.BENCH
    return bench
