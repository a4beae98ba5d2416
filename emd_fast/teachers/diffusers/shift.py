"""Shift of the times at which a pipeline samples a rectified flow, from the configuration of its scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from emd_fast.config import ConfigError


def linear_mu(config: Mapping[str, Any], tokens: int) -> float:
    """The mu of a dynamic shift that is linear in the number of tokens.

    Args:
        config: contents of a scheduler_config.json. Defaults are those of diffusers.
    """
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    first, last = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    mu: float = low + (high - low) * (tokens - first) / (last - first)
    return mu


def shift_of(config: Mapping[str, Any], mu: Callable[[Mapping[str, Any]], float]) -> float:
    """The s of s t / (1 + (s - 1) t). With use_dynamic_shifting it is exp(mu).

    Args:
        config: contents of a scheduler_config.json.
        mu: computes mu for a sample from these contents.

    Raises:
        ConfigError: the configuration gives no positive number.
    """
    try:
        if not config.get("use_dynamic_shifting"):
            shift = config.get("shift", config.get("flow_shift", 1.0))
        else:
            found = mu(config)
            shift = found if config.get("time_shift_type") == "linear" else math.exp(found)
        if 0 < shift < math.inf:
            return float(shift)
    except (TypeError, ArithmeticError):  # values of another kind, or out of range
        pass
    raise ConfigError("the teacher's scheduler has no shift that can be used: give shift, the s of shifted times")
