"""WanTransformer3DModel: Wan 2.1 and 2.2, text to video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import TOKENS, ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import T5, Architecture, Config
from emd_fast.teachers.diffusers.architectures.packing import standardized


class WanTransformer3DModel(Architecture):
    pipelines = ("WanPipeline",)
    text = (*T5, "UMT5EncoderModel")
    vaes = ("AutoencoderKLWan",)
    size = (21, 60, 104)
    video = True
    experts = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for key in ("image_dim", "added_kv_proj_dim"):
            if config.get(key) is not None:
                raise self.refuse(key, "a text-to-video network is")
        self.patch = tuple(config["patch_size"])
        self.takes = ConditionSpec.text(config["text_dim"])

    def vae_channels(self, vae: Any) -> int:
        return int(vae.z_dim)

    def vae_scale(self, vae: Config) -> tuple[int, int]:
        return vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        # The pipeline of Wan 2.2 5B gives each token the same time, which is this one.
        # Its first parameter is one that diffusers keeps in float32: it says nothing of the dtype of the others.
        x = x.to(model.patch_embedding.weight.dtype)
        return model(x, timestep=time, encoder_hidden_states=cond[TOKENS].to(x.dtype)).sample

    def to_vae(self, latents: Tensor, vae: Any) -> Tensor:
        return standardized(latents, vae.config.latents_mean, vae.config.latents_std)

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return returned[0]
