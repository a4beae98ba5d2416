"""DiTTransformer2DModel: DiT, with labels and a learned variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emd_fast.teachers.diffusers.architectures.conditions import ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import Architecture, Config


class DiTTransformer2DModel(Architecture):
    pipelines, schedulers = ("DiTPipeline",), ("DDIMScheduler",)
    cuts_variance = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.patch = (1, config["patch_size"], config["patch_size"])
        # The label after the last class was trained as "no label".
        self.null_label = config["num_embeds_ada_norm"]
        self.takes = ConditionSpec(num_classes=config["num_embeds_ada_norm"] + 1)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return model(x, timestep=time, **cond).sample
