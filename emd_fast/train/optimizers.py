"""AdamW variants, their state in checkpoints, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from emd_fast.config import ConfigError, OptimizerConfig


def make(config: OptimizerConfig, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Creates the configured AdamW: torch's fused one, NVIDIA apex's, or torchao's 8-bit one.

    Raises:
        ConfigError: the optimizer is not installed.
    """
    options: dict[str, Any] = {"lr": lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    if config.name == "apex_adamw":
        try:
            # Recognised by FusedAdam, since the PyPI package named apex is a different project.
            from apex.optimizers import FusedAdam

            return FusedAdam(parameters, adam_w_mode=True, **options)
        except (ImportError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"optimizer 'apex_adamw' needs NVIDIA's apex, built with its CUDA extensions ({error}); "
                "'adamw' is always available"
            ) from None
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(f"optimizer 'adamw_8bit' needs torchao ({error}): pip install torchao, or 'adamw'") from None
    return AdamW8bit(parameters, **options)


def plain(value: torch.Tensor) -> torch.Tensor:
    """Converts a tensor of optimizer state for a checkpoint: dequantizes 8-bit moments.

    Any number of ranks can then read it.
    """
    found: torch.Tensor = value.dequantize() if hasattr(value, "codes") else value
    return found


def as_kept(optimizer: Any, parameter: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
    """Converts what `plain` returned back to the optimizer's format.

    Quantizing a dequantized value gives the same bits again.
    """
    if not hasattr(optimizer, "_new_buffer") or value.shape != parameter.shape:
        return value
    kept: torch.Tensor = optimizer._new_buffer(parameter, key == "exp_avg")
    return kept.copy_(value)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer skips an update by itself when its `found_inf` tensor is set.

    GradScaler uses the same mechanism.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao compiles its step with this tensor
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def rate_scale(config: OptimizerConfig, step: int, steps: int) -> float:
    """Factor of the learning rates at `step` of `steps`: warm-up, then the schedule to lr_end."""
    if step < config.lr_warmup:
        return (step + 1) / config.lr_warmup
    if config.lr_schedule == "constant":
        return 1.0
    gone = min(1.0, (step - config.lr_warmup) / max(1, steps - config.lr_warmup))
    left = 1 - gone if config.lr_schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2
    return config.lr_end + (1 - config.lr_end) * left
