"""UNet2DModel: DDPM and its kin, without a condition or with labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emd_fast.config import ConfigError
from emd_fast.io.reading import shown
from emd_fast.teachers.diffusers.architectures.conditions import ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import Architecture, Config


class UNet2DModel(Architecture):
    component = "unet"
    pipelines, schedulers = ("DDIMPipeline",), ("DDIMScheduler",)
    unguided: Mapping[str, Any] = {}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.get("time_embedding_type", "positional") != "positional":
            raise self.refuse("time_embedding_type", "'positional' is")
        if config.get("class_embed_type") is not None:
            raise ConfigError(
                f"class_embed_type = {shown(config['class_embed_type'])} is not supported: num_class_embeds alone is"
            )
        self.takes = ConditionSpec(num_classes=config.get("num_class_embeds") or 0)

    def vae_scale(self, vae: Config) -> tuple[int, int]:
        return super().vae_scale(vae) if vae else (1, 1)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return model(x, timestep=time, **cond).sample
