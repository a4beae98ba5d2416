"""FLOP formulas of our ops for `torch.utils.flop_counter`, by the conventions of PyTorch's own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from emd_fast.backends import native


@functools.cache
def register() -> None:
    """Adds the formulas of our ops to PyTorch's registry. Any number of threads may call it."""
    # Imported here because it imports Triton, which `import emd_fast` must not.
    from torch.utils.flop_counter import flop_registry

    # register_flop_formula would raise where another thread has registered the formula first.
    for op, formula in _formulas():
        flop_registry.setdefault(op, formula)


def _formulas() -> Iterator[tuple[Any, Callable[..., int]]]:
    yield torch.ops.emd_fast.attention, _attention
    yield torch.ops.emd_fast.attention_backward, _attention_backward
    if native.is_loaded():
        yield torch.ops.emd_fast.winograd, _convolution
        # Under inference_mode the counter sees this op and none of the ops that it calls.
        yield torch.ops.emd_fast.frozen_convolution, _convolution


def _attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """Two matmuls: q k^T, and the weights with v."""
    return 2 * 2 * q.numel() * k.shape[1]


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """Five matmuls: q k^T again, and the gradients of v, of the weights, of q and of k."""
    return 5 * 2 * q.numel() * k.shape[1]


def _convolution(x: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Operations of the direct algorithm, also where Winograd's algorithm needs fewer."""
    return 2 * out_val.numel() * weight[0].numel()
