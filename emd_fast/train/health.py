"""Detects diverged training from the metrics of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from emd_fast import distributed
from emd_fast.config import EMDConfig
from emd_fast.train.learner import Learner


class Diverged(RuntimeError):
    """Training diverged. The message is one line with what was observed and what helps.

    All ranks raise it together; only the main rank needs to print it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.main = distributed.is_main()


def culprit(learners: Mapping[str, Learner]) -> str | None:
    """Names the tensor and the network whose gradient was the last not to be finite, or None.

    Synchronizes with the device.
    """
    for name, learner in learners.items():
        if (tensor := learner.trainable.bad()) is not None:
            return f"{tensor} of the {name}"
    return None


class HealthCheck:
    """Decides whether a run must stop. The decision does not depend on which steps are logged.

    An update with a gradient that is not finite is skipped and counted. A run stops when more than
    max_skipped updates were skipped, or more than half as many as it has steps. It also stops when
    z had a finite RMS above max_z_rms in any step.
    """

    def __init__(self, config: EMDConfig) -> None:
        self._config = config
        self._z_rms_max: Tensor | None = None

    def note(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Records the metrics of a step on the device. Every step calls it.

        Returns:
            {"z_rms_max": the largest finite z_rms so far}.
        """
        z_rms = metrics["z_rms"].nan_to_num(nan=0.0, posinf=0.0)
        self._z_rms_max = z_rms if self._z_rms_max is None else torch.maximum(self._z_rms_max, z_rms)
        return {"z_rms_max": self._z_rms_max}

    def check(self, numbers: dict[str, float], cause: Callable[[], str]) -> None:
        """Checks "skipped" and "z_rms_max".

        Args:
            cause: names the cause; called only if the run must stop.

        Raises:
            Diverged: the run must stop.
        """
        config, skipped, z_rms = self._config, numbers["skipped"], numbers["z_rms_max"]
        allowed = min(config.max_skipped, config.steps // 2)
        if skipped > allowed:
            raise Diverged(
                f"{skipped:.0f} updates were skipped, since their gradients were not finite "
                f"({allowed} may be, by max_skipped and steps): {cause()}"
            )
        if z_rms > config.max_z_rms:
            raise Diverged(f"the RMS of z was {z_rms:.3g} (max_z_rms = {config.max_z_rms:g}): {cause()}")
