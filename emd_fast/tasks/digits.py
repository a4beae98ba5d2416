"""The task "digits": distils a small UNet trained here, and evaluates it on held-out images."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from emd_fast.config import RunConfig
from emd_fast.tasks import digits_data
from emd_fast.tasks.digits_metrics import DigitFeatures, digits_metrics
from emd_fast.tasks.image_metrics import LabelledSet
from emd_fast.tasks.labelled_images import LabelledImages


class Digits(LabelledImages):
    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, digits_data.DIGITS)

    def labels(self) -> Tensor:
        return digits_data.load("test")[1]

    def metrics(self, samples: dict[str, LabelledSet], seed: int) -> dict[str, Any]:
        return digits_metrics(samples, _features(), seed)


@functools.cache
def _features() -> DigitFeatures:
    return DigitFeatures()
