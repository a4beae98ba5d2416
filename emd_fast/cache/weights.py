"""Weights cast (autocast) or normalised (EDM2) once per E-step instead of in every pass.

No weight changes during an E-step, yet autocast casts every frozen one in every pass. Inside
`weight_cache` the layers of fused networks (emd_fast.fusion.layers) read weights that were
computed on entry. The cache lives only inside the block: parameters stay unchanged, and nothing
can become stale between two blocks. In a CUDA graph the computation is part of the graph, so that
a replay reads the current weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

# The attribute of a layer that holds its cached weights, None outside the block. It always exists,
# since compiled code can be guarded by an existing attribute but not by a missing one. Copies and
# pickles drop it.
WEIGHT_CACHE = "_emd_fast_weight_cache"


@contextlib.contextmanager
def weight_cache(*networks: Any) -> Iterator[None]:
    """Context manager: fused layers read weights that are cast or normalised once, on entry.

    The results are the same bit for bit. The cached dtype is that of the autocast active on entry.
    The parameter itself is read where another autocast is active inside, or where its gradient is
    required. Weights must not change inside the block.

    Two kinds of weights are not cached: those that FSDP2 has not gathered in float32, and those
    that an adapter around the layer reads itself, as DoRA does.

    Args:
        networks: modules, bare or wrapped; other objects are ignored.
    """
    modules = [module for network in networks if isinstance(network, nn.Module) for module in network.modules()]
    layers: dict[int, Any] = {id(module): module for module in modules if WEIGHT_CACHE in vars(module)}
    for module in modules:
        for part in module.modules() if _reads_weights(module) else ():
            layers.pop(id(part), None)
    made = [(layer, layer.prepare()) for layer in layers.values()]
    outer = [(layer, layer.__dict__[WEIGHT_CACHE]) for layer, _ in made]
    try:
        for layer, tensors in made:
            layer.__dict__[WEIGHT_CACHE] = tensors
        yield
    finally:
        for layer, tensors in outer:
            layer.__dict__[WEIGHT_CACHE] = tensors


def _reads_weights(module: Any) -> bool:
    """Whether this is a peft wrapper that reads the weights of the layers inside (not plain LoRA)."""
    variant = getattr(module, "lora_variant", None) or getattr(module, "lora_magnitude_vector", None)
    return hasattr(module, "base_layer") and (bool(variant) or not hasattr(module, "lora_A"))


def has_memory(parameter: Tensor | None) -> bool:
    """Whether this is a tensor with its own memory (or its stand-in in a trace): no shard, no subclass."""
    return type(parameter) in (Tensor, nn.Parameter, FakeTensor)


def is_plain(parameter: Tensor | None) -> bool:
    """Whether this is a float32 tensor with its own memory."""
    return parameter is not None and has_memory(parameter) and parameter.dtype == torch.float32


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The active autocast dtype of a device type, None without autocast."""
    # Autocast cannot be queried on the meta device, and PyTorch 2.11 cannot compile the query
    # whether a device type supports autocast. Hence the list.
    active = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if active else None
