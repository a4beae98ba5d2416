"""Runs a generator without parameter gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from emd_fast.em.types import GeneratorLike


@contextlib.contextmanager
def frozen(generator: GeneratorLike) -> Iterator[GeneratorLike]:
    """Yields the generator with `requires_grad` off for its parameters while the block runs.

    `torch.autograd.grad` to z alone is not enough: compiled graphs and custom backward passes
    compute the gradient of every weight that requires one. The DDP wrapper is left out, since it
    would wait for gradients that never come. FSDP2 modules must be gathered before.
    """
    bare = generator.module if isinstance(generator, DistributedDataParallel) else generator
    trainable = [p for p in bare.parameters() if p.requires_grad] if isinstance(bare, nn.Module) else []
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield bare
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
