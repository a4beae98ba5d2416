"""Finds the cause of a diverged step: repeats its E-step and looks at what each network returns."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emd_fast import distributed
from emd_fast.train.health import culprit

if TYPE_CHECKING:
    from emd_fast.train.trainer import EMDTrainer

_HUGE = 1e4
"""An RMS that no output of a working teacher or fake score comes near."""
_HUGE_SAMPLE = 1e3
"""An RMS that no image, latent or noised sample of a working run comes near."""


def cause(trainer: EMDTrainer) -> str:
    """Names the cause of a diverged step, in one sentence with a remedy. All ranks call it.

    The E-step of the last step is repeated with its noise. The first network that returns values
    that are not finite, or huge, for inputs that are neither, is the cause. If z was above max_z_rms
    by then, the cause is its chain. If nothing is found, a gradient was not finite: its tensor is named.

    Returns:
        The sentence, the same on every rank: that of the first rank which found something.
    """
    found: list[str] = []
    networks = {"generator": trainer.generator, "teacher": trainer.teacher, "fake score": trainer.fake_score}
    trainer.batches.at(max(0, trainer.steps_done - 1))
    with _observed(networks, found, trainer.config.max_z_rms), torch.no_grad():
        for micro_batch in trainer.batches.micro_batches(None, 0):
            samples = range(micro_batch.first, micro_batch.first + micro_batch.size)
            posterior = trainer.sample_posterior(samples=samples, watch=lambda step: None)
            if not found and _wrong(posterior.z, trainer.config.max_z_rms):
                found.append(_CHAIN)
    told: list[str | None] = [found[0] if found else None] * distributed.world_size()
    if distributed.world_size() > 1:
        dist.all_gather_object(told, told[distributed.rank()])
    named = culprit(trainer.learners)
    last = f"the last gradient that was not finite is that of {named}: " if named else ""
    return next((each for each in told if each), f"{last}try smaller learning rates, or a smaller gamma_z")


_CHAIN = (
    "the Langevin chain of z diverges: use a smaller gamma_z, or pairs [sigma, value] that make it small "
    "where sigma is small"
)


@contextlib.contextmanager
def _observed(networks: dict[str, nn.Module], found: list[str], max_z_rms: float) -> Iterator[None]:
    """Context manager: appends a sentence to `found` at the first wrong output."""

    def look(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if found or not isinstance(output, Tensor):
            return
        samples = name == "generator"
        if not (wrong := _wrong(output, _HUGE_SAMPLE if samples else _HUGE)):
            return
        if _wrong(inputs[0], max_z_rms if samples else _HUGE_SAMPLE):
            found.append(_CHAIN)
        else:
            helps = (
                "check its weights and its conditions"
                if name == "teacher"
                else "try smaller learning rates, or a smaller gamma_z"
            )
            found.append(f"the {name} returned values {wrong} for a sound input: {helps}")

    hooks = [
        network.register_forward_hook(functools.partial(look, name))
        for name, network in networks.items()
        if isinstance(network, nn.Module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _wrong(x: Tensor, limit: float) -> str:
    """Describes values that no working run has; empty for good ones."""
    if not bool(torch.isfinite(x).all()):
        return "that are not finite"
    rms = float(x.detach().double().square().mean().sqrt())
    return f"of RMS {rms:.2g}" if rms > limit else ""
