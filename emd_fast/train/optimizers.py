"""The optimizers by name, and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from emd_fast.config import ConfigError, EMDConfig


def make(config: EMDConfig, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """AdamW of the configured kind: torch's fused one, NVIDIA apex's, or torchao's with 8-bit state.

    Raises:
        ConfigError: one that is not installed here.
    """
    options: dict[str, Any] = {"lr": lr, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    if config.optimizer == "apex_adamw":
        try:
            # By what it has: the package called apex on PyPI is another thing.
            from apex.optimizers import FusedAdam

            return FusedAdam(parameters, adam_w_mode=True, **options)
        except (ImportError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"optimizer 'apex_adamw' needs NVIDIA's apex, built with its CUDA extensions ({error}); "
                "'adamw' is there always"
            ) from None
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(f"optimizer 'adamw_8bit' needs torchao ({error}): pip install torchao, or 'adamw'") from None
    return AdamW8bit(parameters, **options)


def plain(value: torch.Tensor) -> torch.Tensor:
    """A tensor of an optimizer's state as a checkpoint has it: moments of 8 bits as the numbers that they stand for,
    which any number of ranks can read."""
    found: torch.Tensor = value.dequantize() if hasattr(value, "codes") else value
    return found


def as_kept(optimizer: Any, parameter: torch.Tensor, key: str, value: torch.Tensor) -> torch.Tensor:
    """What `plain` made of a state, as the optimizer keeps it; the same bits, since it rounds what it has rounded."""
    if not hasattr(optimizer, "_new_buffer") or value.shape != parameter.shape:
        return value
    kept: torch.Tensor = optimizer._new_buffer(parameter, key == "exp_avg")
    return kept.copy_(value)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it leaves out a step by itself where its `found_inf` tensor says so, as GradScaler makes it."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao's are compiled with it, and keep it
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def rate_scale(config: EMDConfig, step: int) -> float:
    """What the learning rates are multiplied by at `step`: linear warm-up, then the schedule down to lr_end."""
    if step < config.lr_warmup:
        return (step + 1) / config.lr_warmup
    if config.lr_schedule == "constant":
        return 1.0
    gone = min(1.0, (step - config.lr_warmup) / max(1, config.steps - config.lr_warmup))
    left = 1 - gone if config.lr_schedule == "linear" else (1 + math.cos(math.pi * gone)) / 2
    return config.lr_end + (1 - config.lr_end) * left
