"""Teacher and fake score as one pass: an adapter that acts on the last rows of a batch alone.

peft's own batches of several adapters (`adapter_names`) look rows up by lists, which makes the host wait
in every layer, and refuse networks that do not pass the names on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_CLASSES: dict[type, type] = {}


class AdaptedRows:
    """Which rows the adapter of a network acts on: all, except inside `without`.

    Args:
        network: with adapters of plain LoRA, fused already. The classes of its adapted layers become
            subclasses of theirs.
    """

    def __init__(self, network: nn.Module) -> None:
        self.plain: tuple[int, int] | None = None
        for module in network.modules():
            if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                module._emd_fast_rows = self  # type: ignore[assignment]
                module.__class__ = _subclass(type(module))

    @contextlib.contextmanager
    def without(self, plain: int, of: int) -> Iterator[None]:
        """Context manager: the first `plain` of `of` equal parts of every batch pass without the adapter."""
        outer, self.plain = self.plain, (plain, of)
        try:
            yield
        finally:
            self.plain = outer


class _Layer:
    """A layer of peft whose adapter acts on some rows of its input."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._emd_fast_rows.plain is None:
            whole: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return whole
        plain, of = self._emd_fast_rows.plain
        if len(x) % of:
            raise ValueError(
                f"score_passes must be 'separate' for this network: an adapted layer is given {len(x)} rows for a "
                f"batch of {of} equal parts"
            )
        first = len(x) // of * plain
        result: Tensor = self.base_layer(x, *args, **kwargs)
        own, differentiated = result[first:], torch.is_grad_enabled()
        for name in self.active_adapters:
            a, b = self.lora_A[name], self.lora_B[name]
            added = b(a(x[first:].to(a.weight.dtype))) * self.scaling[name]
            # Rounded as in peft's layer, which adds before it converts. In place where no gradient is wanted.
            own = (own + added).to(own.dtype) if differentiated else own.add_(added)
        return torch.cat([result[:first], own]) if differentiated else result


def _subclass(base: type) -> type:
    if base not in _CLASSES:
        _CLASSES[base] = type(base.__name__, (_Layer, base), {"__module__": base.__module__})
    return _CLASSES[base]
