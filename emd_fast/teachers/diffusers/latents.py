"""The statistics of latents in the configuration of a VAE, by which samples are scaled before it decodes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from emd_fast.config import ConfigError
from emd_fast.io.reading import shown

_LARGEST = 1e9


def check_statistics(config: Mapping[str, Any], channels: int) -> None:
    """Checks the statistics that a VAE's configuration has.

    Args:
        channels: of the latents.

    Raises:
        ConfigError: a scale or a standard deviation that is no positive number, a shift or a mean that
            is no number, or other numbers than one a channel.
    """
    for key, positive in (("scaling_factor", True), ("shift_factor", False)):
        value = config.get(key)
        if value is not None and not _is_number(value, positive):
            raise ConfigError(f"the VAE has {key} = {shown(value)}: {_wanted(positive)} is needed")
    for key, positive in (("latents_std", True), ("latents_mean", False)):
        values = config.get(key)
        if values is None:
            continue
        if not isinstance(values, (list, tuple)) or len(values) != channels:
            raise ConfigError(f"the VAE has {key} = {shown(values)}: {channels} numbers are needed, one a channel")
        for value in values:
            if not _is_number(value, positive):
                raise ConfigError(f"the VAE has {shown(value)} in {key}: {_wanted(positive)} is needed")


def _is_number(value: Any, positive: bool) -> bool:
    if type(value) not in (int, float) or not abs(value) <= _LARGEST:
        return False
    return value > 0 or not positive


def _wanted(positive: bool) -> str:
    return "a positive number" if positive else "a finite number"
