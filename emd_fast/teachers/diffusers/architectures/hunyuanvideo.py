"""HunyuanVideoTransformer3DModel: HunyuanVideo, text to video."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import GUIDANCE, MASK, POOLED, TOKENS, ConditionSpec, Rows
from emd_fast.teachers.diffusers.architectures.form import CLIP, Architecture, Config


class HunyuanVideoTransformer3DModel(Architecture):
    pipelines = ("HunyuanVideoPipeline",)
    text = (*CLIP, "LlamaModel", "LlamaTokenizer", "LlamaTokenizerFast")
    vaes = ("AutoencoderKLHunyuanVideo",)
    size = (33, 90, 160)
    video = True
    guidance = 6.0
    unguided: Mapping[str, Any] = {}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.get("image_condition_type") is not None:
            raise self.refuse("image_condition_type", "a text-to-video network is")
        self.patch = (config["patch_size_t"], config["patch_size"], config["patch_size"])
        others: Rows = {
            POOLED: (config["pooled_projection_dim"],),
            **({GUIDANCE: ()} if config["guidance_embeds"] else {}),
        }
        self.takes = ConditionSpec.text(config["text_embed_dim"], others, masked=True)

    def vae_scale(self, vae: Config) -> tuple[int, int]:
        return vae.get("temporal_compression_ratio", 4), vae.get("spatial_compression_ratio", 8)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return model(
            x,
            timestep=time,
            encoder_hidden_states=cond[TOKENS].to(x.dtype),
            encoder_attention_mask=cond[MASK].to(x.dtype),
            pooled_projections=cond[POOLED].to(x.dtype),
            guidance=1000 * cond[GUIDANCE] if GUIDANCE in cond else None,
        ).sample

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0], POOLED: returned[1], MASK: returned[2].bool()}
