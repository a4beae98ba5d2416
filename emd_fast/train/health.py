"""When training must not go on: what the metrics of a step say of it, and what helps."""

from __future__ import annotations

import math
from collections.abc import Callable

from emd_fast import distributed
from emd_fast.config import EMDConfig


class Diverged(RuntimeError):
    """Training that must not go on: one line that says what was seen and what helps. All ranks raise it alike, and the
    main one alone has to say it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.main = distributed.is_main()


def check_health(
    metrics: dict[str, float], config: EMDConfig, culprit: Callable[[], str | None] = lambda: None
) -> None:
    """Looks at one step's metrics, as numbers; `culprit` says which tensor's gradient was not finite.

    Raises:
        Diverged: the run must stop, and why.
    """
    if metrics["skipped"] > config.max_skipped:
        named = culprit()
        raise Diverged(
            f"{metrics['skipped']:.0f} gradients were not finite{f', last that of {named}' if named else ''} "
            f"(max_skipped = {config.max_skipped}); "
            "the weights are those before them. Try smaller learning rates, or a smaller gamma_z"
        )
    if not metrics["z_rms"] <= config.max_z_rms:  # also true for a NaN
        raise Diverged(
            f"the RMS of z is {metrics['z_rms']:.3g} (max_z_rms = {config.max_z_rms:g}): the Langevin chain of z "
            "diverges. Use a smaller gamma_z, or pairs [sigma, value] that make it small where sigma is small"
        )
    if not math.isfinite(metrics["drift_rms"]):
        raise Diverged("drift is not finite: the teacher or the student returned values that are not finite")
