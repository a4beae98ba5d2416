"""What PyTorch's counters of floating-point operations are told about our ops: as much as about its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from emd_fast.backends import native


@functools.cache
def register() -> None:
    """Adds the formulas of our ops to PyTorch's registry, from any number of threads."""
    # Not at the top: it imports Triton, which a bare import of the library must not.
    from torch.utils.flop_counter import flop_registry

    # And not by register_flop_formula, which raises where another thread was first.
    for op, formula in _formulas():
        flop_registry.setdefault(op, formula)


def _formulas() -> Iterator[tuple[Any, Callable[..., int]]]:
    yield torch.ops.emd_fast.attention, _attention
    yield torch.ops.emd_fast.attention_backward, _attention_backward
    if native.is_loaded():
        yield torch.ops.emd_fast.winograd, _convolution
        # Under inference_mode it is seen itself, and nothing that it calls.
        yield torch.ops.emd_fast.frozen_convolution, _convolution


def _attention(q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """q k^T of (B, tokens, heads, head_dim) and (B, keys, heads, head_dim), and its product with v."""
    return 2 * 2 * q.numel() * k.shape[1]


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, *_: Any, **__: Any) -> int:
    """Five products: q k^T again, and the gradients of v, of the probabilities, of q and of k."""
    return 5 * 2 * q.numel() * k.shape[1]


def _convolution(x: Tensor, weight: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Those of the definition, whatever the algorithm takes."""
    return 2 * out_val.numel() * weight[0].numel()
