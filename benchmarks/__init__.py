"""Benchmarks: one file per op declares inputs, contenders and bytes; harness/ verifies and times them.

emd-fast bench langevin_eps    times all contenders interleaved in one process; the docs quote these
pytest benchmarks              times the same verified contenders one by one with pytest-benchmark
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
    "residual",
    "geglu",
    "attention",
)
"""Benchmarks that run when the command line names none."""

LAYERS = ("convolution", "residual_block")
"""Layers that surround the fused norms of a network."""

WHOLE_NETWORKS = tuple(f"{what}:{network}" for what in ("unet", "e_step") for network in ("small", "adm", "sd15"))
"""Forward passes and E-steps of whole networks."""

DISTILLATION_LOOPS = tuple(name.replace("unet:", "loop:") for name in WHOLE_NETWORKS if name.startswith("unet:"))
"""Training steps of the same networks in a plain PyTorch loop."""

NAMES = (*OPS, *LAYERS, "training_step", *WHOLE_NETWORKS, *DISTILLATION_LOOPS)


def load(name: str) -> Bench:
    """Returns the declaration of one of NAMES."""
    module, _, network = name.partition(":")
    declared = importlib.import_module(f"benchmarks.{module}")
    bench: Bench = declared.bench(network) if network else declared.BENCH
    return bench
