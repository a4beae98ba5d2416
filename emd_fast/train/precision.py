"""Compute precision of the networks: bfloat16 by autocast, or float32."""

from __future__ import annotations

import torch


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Dtype of the networks' passes for a value of `precision`; "auto" is bfloat16 on a GPU alone."""
    reduced = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if reduced else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Context manager for the networks' passes. It changes nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)
