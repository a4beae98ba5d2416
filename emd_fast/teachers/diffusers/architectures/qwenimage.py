"""QwenImageTransformer2DModel: Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import GUIDANCE, MASK, TOKENS, ConditionSpec, Rows
from emd_fast.teachers.diffusers.architectures.form import Config
from emd_fast.teachers.diffusers.architectures.packing import PackedImage, packed, rescaled, standardized, unpacked


class QwenImageTransformer2DModel(PackedImage):
    pipelines = ("QwenImagePipeline",)
    text = ("Qwen2_5_VLForConditionalGeneration", "Qwen2Tokenizer", "Qwen2TokenizerFast")
    vaes = ("AutoencoderKLQwenImage",)
    guidance = 1.0
    unguided: Mapping[str, Any] = {"true_cfg_scale": 1.0}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for key in ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(key):
                raise self.refuse(key, "a text-to-image network is")
        others: Rows = {GUIDANCE: ()} if config["guidance_embeds"] else {}
        self.takes = ConditionSpec.text(config["joint_attention_dim"], others, masked=True)

    @property
    def returned(self) -> int:
        return int(self.config["out_channels"] or self.channels)

    def heard(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return t.to(dtype).float()

    def vae_channels(self, vae: Any) -> int:
        return int(vae.z_dim)

    def vae_scale(self, vae: Config) -> tuple[int, int]:
        return 1, 2 ** len(vae["temperal_downsample"]) if vae else 8

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        output = model(
            packed(x),
            timestep=time / 1000,
            guidance=cond.get(GUIDANCE),
            encoder_hidden_states=cond[TOKENS].to(x.dtype),
            encoder_hidden_states_mask=cond[MASK],
            img_shapes=[[(1, x.shape[2] // 2, x.shape[3] // 2)]] * len(x),
        ).sample
        return unpacked(output, x)

    def rescale(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """The guided output with the norm of the conditional one in each patch."""
        return unpacked(rescaled(packed(guided), packed(conditional)), guided)

    def decode(self, latents: Tensor, vae: Any) -> Tensor:
        scaled = standardized(latents, vae.config.latents_mean, vae.config.latents_std)
        image: Tensor = vae.decode(scaled[:, :, None]).sample[:, :, 0]
        return image

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        tokens, mask = returned  # without a mask all tokens count
        every = tokens.new_ones(tokens.shape[:2]) if mask is None else mask
        return {TOKENS: tokens, MASK: every.bool()}
