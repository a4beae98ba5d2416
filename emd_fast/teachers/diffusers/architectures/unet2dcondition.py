"""UNet2DConditionModel: Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import POOLED, TOKENS, ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import CLIP, T5, Architecture, Config
from emd_fast.teachers.diffusers.architectures.packing import standardized

SIZES = "time_ids"  # original height and width, top and left of the crop, height and width, in pixels


class UNet2DConditionModel(Architecture):
    component = "unet"
    schedulers = ("DDIMScheduler", "EulerDiscreteScheduler")
    text = (*CLIP, *T5)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.xl = config.get("addition_embed_type") == "text_time"
        for key in ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds"):
            if config.get(key) is not None and not (self.xl and key == "addition_embed_type"):
                raise self.refuse(key, "one that takes text embeddings alone, or SDXL's 'text_time', is")
        width = config["cross_attention_dim"]
        if self.xl:
            self.pipelines = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            self.takes = ConditionSpec.text(width, {POOLED: (pooled,), SIZES: (6,)})
        else:
            self.pipelines = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
            self.takes = ConditionSpec.text(width)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        added = {}
        if self.xl:
            added["added_cond_kwargs"] = {"text_embeds": cond[POOLED].to(x.dtype), "time_ids": cond[SIZES].to(x.dtype)}
        return model(x, timestep=time, encoder_hidden_states=cond[TOKENS].to(x.dtype), **added).sample

    def to_vae(self, latents: Tensor, vae: Any) -> Tensor:
        mean, std = (getattr(vae.config, f"latents_{name}", None) for name in ("mean", "std"))
        if not self.xl or mean is None or std is None:
            return super().to_vae(latents, vae)
        return standardized(latents / vae.config.scaling_factor, mean, std)

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0], POOLED: returned[2]} if self.xl else returned[0]

    def of_size(self, shape: Sequence[int], vae: Config) -> dict[str, list[float]]:
        _, height, width = self.pixels(shape, vae)
        return {SIZES: [height, width, 0, 0, height, width]} if self.xl else {}
