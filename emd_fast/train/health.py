"""Detects diverged training from the metrics of a step, and says what helps."""

from __future__ import annotations

import math
from collections.abc import Mapping

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


def check_health(metrics: dict[str, float], config: EMDConfig, learners: Mapping[str, Learner]) -> None:
    """Checks one step's metrics.

    Args:
        metrics: at least "skipped", "z_rms" and "drift_rms", as Python numbers.
        learners: the trainer's; they know which gradient was not finite.

    Raises:
        Diverged: the run must stop.
    """
    if metrics["skipped"] > config.max_skipped:
        named = culprit(learners)
        raise Diverged(
            f"{metrics['skipped']:.0f} gradients were not finite{f', last that of {named}' if named else ''} "
            f"(max_skipped = {config.max_skipped}); "
            "their updates were skipped. Try smaller learning rates, or a smaller gamma_z"
        )
    if not metrics["z_rms"] <= config.max_z_rms:  # also true for a NaN
        raise Diverged(
            f"the RMS of z is {metrics['z_rms']:.3g} (max_z_rms = {config.max_z_rms:g}): the Langevin chain of z "
            "diverges. Use a smaller gamma_z, or pairs [sigma, value] that make it small where sigma is small"
        )
    if not math.isfinite(metrics["drift_rms"]):
        raise Diverged("drift is not finite: the teacher or the fake score returned values that are not finite")
