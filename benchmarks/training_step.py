"""Whole training step of digits (K = 8), compared with the bare passes of its networks.

The bare passes call the same networks, forward and backward, and compute nothing else: no noise, no
Langevin update, no loss, no optimizer, no average. The check verifies that both sides call each
network as often as the algorithm prescribes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.harness.declare import Bench, Function, Inputs, RandomTensors
from emd_fast import EMDTrainer, config
from emd_fast.em.frozen import frozen
from emd_fast.tasks import digits_data, image_teacher

STEPS = 8


def inputs(random: RandomTensors) -> Inputs:
    case, recipe = random.case, config.load("digits")
    precision: Literal["float32", "bfloat16"] = "float32" if case.dtype == "fp32" else "bfloat16"
    if case.dtype == "fp16":
        raise config.ConfigError(f"training_step takes --dtype fp32 or bf16, got {case.dtype}")
    compute = dataclasses.replace(recipe.emd.compute, precision=precision)
    settings = dataclasses.replace(
        recipe.emd, langevin_steps=STEPS, batch_size=case.shape[0], fake_score_warmup=0, compute=compute
    )
    teacher = image_teacher.untrained(recipe.teacher, digits_data.DIGITS).to(case.device)
    with torch.no_grad():  # the last layer is initialised to zero
        for parameter in teacher.parameters():
            parameter.add_(0.02 * random.normal(*parameter.shape))
    trainer = EMDTrainer(teacher, settings)
    shape = (case.shape[0], *digits_data.SHAPE)
    return Inputs(
        {
            "trainer": trainer,
            "calls": Calls(trainer),
            "x": random.normal(*shape),
            "cotangent": random.normal(*shape),
            "t": torch.ones(shape[0], device=case.device),
            "cond": torch.arange(shape[0], device=case.device) % digits_data.CLASSES,
        }
    )


class Calls:
    """Counts the calls of generator, teacher and fake score."""

    def __init__(self, trainer: EMDTrainer) -> None:
        networks = (trainer.generator, trainer.teacher, trainer.fake_score)
        self._counts = [0] * len(networks)
        for i, network in enumerate(networks):
            network.register_forward_hook(functools.partial(self._count, i))

    def _count(self, i: int, *_: Any) -> None:
        self._counts[i] += 1

    def taken(self) -> Tensor:
        """Returns the counts since the last call, shape (3,)."""
        counts, self._counts = self._counts, [0] * len(self._counts)
        return torch.tensor(counts, dtype=torch.float32)


def step(trainer: EMDTrainer, calls: Calls, **arguments: Any) -> Tensor:
    with torch.enable_grad():
        trainer.step()
    return calls.taken()


def bare(trainer: EMDTrainer, calls: Calls, x: Tensor, cotangent: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    with trainer.autocast(), torch.enable_grad():
        for _ in range(trainer.config.fake_score_updates):
            with torch.no_grad():
                trainer.generator(x, cond)
            trainer.fake_score.zero_grad(set_to_none=True)
            trainer.fake_score(x, t, cond).backward(cotangent)
        with frozen(trainer.generator) as generator:
            for _ in range(trainer.config.langevin_steps):
                z = x.detach().requires_grad_()
                generated = generator(z, cond)
                with torch.no_grad():
                    trainer.teacher(x, t, cond)
                    trainer.fake_score(x, t, cond)
                torch.autograd.grad(generated, z, cotangent)
        trainer.generator.zero_grad(set_to_none=True)
        trainer.generator(x, cond).backward(cotangent)
    return calls.taken()


def exact(trainer: EMDTrainer, **arguments: Any) -> Tensor:
    updates, steps = trainer.config.fake_score_updates, trainer.config.langevin_steps
    return torch.tensor([updates + steps + 1, steps, updates + steps], dtype=torch.float64)


def implementations(bench: Bench, device: torch.device) -> dict[str, Function | str]:
    return {"training step": step}


BENCH = Bench(
    name="training_step",
    op=step,
    inputs=inputs,
    eager=bare,
    exact=exact,
    traffic=None,
    shapes={"cpu": ((128,),), "cuda": ((128,),)},
    axes=("B",),
    implementations=implementations,
    layouts=False,
    rotates=False,
    captures=False,
    compiles=False,
    eager_name="bare passes",
    dtype={"cpu": "fp32", "cuda": "bf16"},
)
