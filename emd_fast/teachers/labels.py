"""Checks of class labels."""

from __future__ import annotations

import torch
from torch import Tensor


def check_labels(labels: Tensor, batch: int, num_classes: int, *, none: bool = False) -> None:
    """Checks that labels are (batch,) int64 in [0, num_classes).

    Values are checked for CPU tensors only, and not in compiled code.

    Args:
        none: also allow the label num_classes, which means "no label".

    Raises:
        TypeError: labels that are not int64.
        ValueError: a wrong shape or a label outside of the range.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != (batch,):
        raise ValueError(f"labels must have shape ({batch},), got {tuple(labels.shape)}")
    # Reading values would synchronise with a GPU, and cause a graph break in compiled code.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and type(labels) is Tensor and batch:
        low, high = (end.item() for end in torch.aminmax(labels))
        if low < 0 or high >= num_classes + none:
            also = f" or {num_classes} for none," if none else ""
            raise ValueError(f"labels must be in [0, {num_classes}),{also} got from {low} to {high}")
