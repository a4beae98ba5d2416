"""Activation checkpointing: the backward pass computes those of a block again, and few have to be kept."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from emd_fast import backends
from emd_fast.distributed import blocks_of


@contextlib.contextmanager
def recomputed(network: nn.Module) -> Iterator[None]:
    """Inside, a pass of the network with gradients keeps of each block (`distributed.blocks_of`) its inputs alone.

    Results and gradients are those without it, bit for bit; the price is one more forward pass. The forward is replaced
    on the blocks themselves and for the time of the `with` block: classes, hooks, state dicts and copies stay as they
    are, and FSDP2 does not see it.
    """
    mine = [(block, block.__dict__.get("forward"), block.forward) for block in blocks_of(network)]
    for block, _, forward in mine:
        block.__dict__["forward"] = functools.partial(_checkpointed, forward)
    try:
        yield
    finally:
        for block, own, _ in mine:
            if own is None:
                del block.__dict__["forward"]
            else:
                block.__dict__["forward"] = own


def _checkpointed(forward: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    # On a GPU the backward pass runs in a thread of its own, which knows nothing of use_backend.
    backend = backends.active()
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing in the three networks is random
        context_fn=lambda: (contextlib.nullcontext(), backends.use_backend(backend)),
        **keywords,
    )
