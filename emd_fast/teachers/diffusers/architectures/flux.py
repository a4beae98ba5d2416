"""FluxTransformer2DModel: Flux.1 dev and schnell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import GUIDANCE, POOLED, TOKENS, ConditionSpec, Rows
from emd_fast.teachers.diffusers.architectures.form import CLIP, T5, Config
from emd_fast.teachers.diffusers.architectures.packing import PackedImage, grid_ids, packed, unpacked


class FluxTransformer2DModel(PackedImage):
    pipelines = ("FluxPipeline",)
    text = (*CLIP, *T5)
    guidance = 3.5
    unguided: Mapping[str, Any] = {}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        others: Rows = {
            POOLED: (config["pooled_projection_dim"],),
            **({GUIDANCE: ()} if config["guidance_embeds"] else {}),
        }
        self.takes = ConditionSpec.text(config["joint_attention_dim"], others)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        tokens = cond[TOKENS].to(x.dtype)
        output = model(
            packed(x),
            timestep=time / 1000,
            guidance=cond.get(GUIDANCE),
            encoder_hidden_states=tokens,
            pooled_projections=cond[POOLED].to(x.dtype),
            txt_ids=x.new_zeros(tokens.shape[1], 3),
            img_ids=grid_ids(x),
        ).sample
        return unpacked(output, x)

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0], POOLED: returned[1]}
