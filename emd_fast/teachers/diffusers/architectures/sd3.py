"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import POOLED, TOKENS, ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import CLIP, CLIP_TOKENS, T5, Architecture, Config


class SD3Transformer2DModel(Architecture):
    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline")
    text = (*CLIP, *T5)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = ConditionSpec.text(config["joint_attention_dim"], {POOLED: (config["pooled_projection_dim"],)})
        self.patch = (1, config["patch_size"], config["patch_size"])

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        tokens, pooled = cond[TOKENS].to(x.dtype), cond[POOLED].to(x.dtype)
        return model(x, timestep=time, encoder_hidden_states=tokens, pooled_projections=pooled).sample

    def text_tokens(self) -> int:
        return CLIP_TOKENS + super().text_tokens()  # one after the other

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0], POOLED: returned[2]}
