"""A whole training step over the bare passes of its networks: digits, batch 128, K = 8, on the CPU.

The bare passes are the same calls of the same networks, forward and backward, with nothing between them: no noise, no
update of (eps, z), no loss, no optimizer, no average.

python benchmarks/training_step.py [THREADS]
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from alternate import medians, table

from emd_fast import EMDTrainer, config
from emd_fast.em.e_step import frozen
from emd_fast.teachers import digits


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    recipe = config.load("digits")
    settings = dataclasses.replace(recipe.emd, langevin_steps=8)
    teacher = digits.denoiser(digits.network(recipe.teacher))
    with torch.no_grad():
        for index, parameter in enumerate(teacher.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    trainer = EMDTrainer(teacher, settings)
    batch = (settings.batch_size, *digits.SHAPE)
    x, cotangent = torch.randn(batch), torch.randn(batch)
    t, cond = torch.ones(batch[0]), torch.arange(batch[0]) % digits.CLASSES

    def bare() -> None:
        for _ in range(settings.student_updates):
            with torch.no_grad():
                trainer.generator(x, cond)
            trainer.student.zero_grad(set_to_none=True)
            trainer.student(x, t, cond).backward(cotangent)
        with frozen(trainer.generator) as generator:
            for _ in range(settings.langevin_steps):
                z = x.detach().requires_grad_()
                generated = generator(z, cond)
                with torch.no_grad():
                    trainer.teacher(x, t, cond)
                    trainer.student(x, t, cond)
                torch.autograd.grad(generated, z, cotangent)
        trainer.generator.zero_grad(set_to_none=True)
        trainer.generator(x, cond).backward(cotangent)

    times = medians({"bare passes": bare, "training step": trainer.step}, rounds=30, warmup=3)
    print(table(f"digits, batch 128, K = 8, {threads} threads, medians of 30", times, against="bare passes"))
    print(f"  step over bare passes: {times['training step'] / times['bare passes']:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
