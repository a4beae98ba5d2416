"""Labels of classes, as every network with labels takes them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_labels(labels: Tensor, batch: int, num_classes: int, *, none: bool = False) -> None:
    """labels must be (batch,) int64 in [0, num_classes), or num_classes for no label where there is `none`; values are
    looked at where the host need not wait.

    Raises:
        TypeError: labels not int64. ValueError: of a wrong shape or, of CPU tensors, outside that range.
    """
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != (batch,):
        raise ValueError(f"labels must have shape ({batch},), got {tuple(labels.shape)}")
    # Reading values from a GPU would make the host wait, and compiled code would break its graph here.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and type(labels) is Tensor and batch:
        low, high = (end.item() for end in torch.aminmax(labels))
        if low < 0 or high >= num_classes + none:
            also = f" or {num_classes} for none," if none else ""
            raise ValueError(f"labels must be in [0, {num_classes}),{also} got from {low} to {high}")
