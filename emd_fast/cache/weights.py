"""Weights in the form in which products take them, made once per E-step: autocast's rounding, EDM2's normalisation.

Over the steps of an E-step no weight changes, yet autocast converts every frozen one in every pass. Inside `prepared`
the layers of fused networks (emd_fast.fusion.layers) read what they made of their weights at its start. It belongs to
the block: parameters stay what they are, nothing can become stale between two blocks, and in a CUDA graph it is part of
the graph, so that a replay reads the weights as they are then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# The attribute in which a layer finds what it prepared, None outside of the block: compiled code is guarded by an
# attribute that is there, and not by one that is missing. Not part of copies and pickles.
PREPARED = "_emd_fast_prepared"


@contextlib.contextmanager
def prepared(*networks: Any) -> Iterator[None]:
    """Context manager: inside it, fused layers of the networks read weights that were rounded or normalised here.

    The results are those without it, bit for bit. Taken is the dtype of the autocast that is active at the start; where
    it is another inside, or where a gradient of the parameter is wanted, the parameter itself is read. Weights must not
    change inside. Of what FSDP2 holds in shards, weights are prepared that are gathered, and in float32. Left are those
    that an adapter around the layer reads itself, as DoRA does.

    Args:
        networks: modules, wrapped ones too; what is none is passed over.
    """
    modules = [module for network in networks if isinstance(network, nn.Module) for module in network.modules()]
    layers: dict[int, Any] = {id(module): module for module in modules if PREPARED in vars(module)}
    for module in modules:
        for part in module.modules() if _reads_weights(module) else ():
            layers.pop(id(part), None)
    made = [(layer, layer.prepare()) for layer in layers.values()]
    outer = [(layer, layer.__dict__[PREPARED]) for layer, _ in made]
    try:
        for layer, tensors in made:
            layer.__dict__[PREPARED] = tensors
        yield
    finally:
        for layer, tensors in outer:
            layer.__dict__[PREPARED] = tensors


def _reads_weights(module: Any) -> bool:
    """Whether it is a wrapper of peft that computes with the parameters of the layers inside: all but plain LoRA."""
    variant = getattr(module, "lora_variant", None) or getattr(module, "lora_magnitude_vector", None)
    return hasattr(module, "base_layer") and (bool(variant) or not hasattr(module, "lora_A"))


def is_plain(parameter: Tensor | None) -> bool:
    """Whether it is float32 and has memory of its own: no shard, no quantised subclass."""
    return parameter is not None and type(parameter) in (Tensor, nn.Parameter) and parameter.dtype == torch.float32


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """In which products are computed; None where no autocast is active."""
    # The meta device has no autocast to ask for; PyTorch 2.11 cannot compile the question whether a device has one.
    active = device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if active else None
