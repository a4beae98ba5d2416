"""SanaTransformer2DModel: Sana, on latents of a deep-compression autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emd_fast.cache.conditioning import same
from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import MASK, TOKENS, ConditionSpec, in_dtype
from emd_fast.teachers.diffusers.architectures.form import GEMMA, Architecture, Config


class SanaTransformer2DModel(Architecture):
    pipelines = ("SanaPipeline",)
    cuts_variance = True
    unguided: Mapping[str, Any] = {"guidance_scale": 1.0, "use_resolution_binning": False}
    text = GEMMA
    vaes = ("AutoencoderDC",)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.get("guidance_embeds"):
            raise self.refuse("guidance_embeds", "a network of SanaPipeline is")
        self.patch = (1, config["patch_size"], config["patch_size"])
        self.takes = ConditionSpec.text(config["caption_channels"], masked=True)

    def vae_scale(self, vae: Config) -> tuple[int, int]:
        return 1, 2 ** (len(vae["encoder_block_out_channels"]) - 1) if vae else 32

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return model(
            x,
            timestep=same(self._scaled, time),
            encoder_hidden_states=in_dtype(cond[TOKENS], x.dtype),
            encoder_attention_mask=cond[MASK],
        ).sample

    def _scaled(self, time: Tensor) -> Tensor:
        scaled: Tensor = time * self.config["timestep_scale"]
        return scaled

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0], MASK: returned[1].bool()}
