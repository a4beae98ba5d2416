"""ChromaTransformer2DModel: Chroma 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import LENGTH, TOKENS, ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import T5, Config
from emd_fast.teachers.diffusers.architectures.packing import PackedImage, grid_ids, packed, unpacked

# What ChromaPipeline makes of its prompts is a float mask, which the attention adds to its logits: 1 for tokens, 0 for
# padding. Padding counts therefore, and is that of the pipeline.
BIAS = "prompt_bias"


class ChromaTransformer2DModel(PackedImage):
    pipelines = ("ChromaPipeline",)
    text = T5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = ConditionSpec.text(config["joint_attention_dim"], {BIAS: (LENGTH,)})

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        image, tokens, bias = packed(x), cond[TOKENS].to(x.dtype), cond[BIAS].to(x.dtype)
        output = model(
            image,
            timestep=time / 1000,
            encoder_hidden_states=tokens,
            txt_ids=x.new_zeros(tokens.shape[1], 3),
            img_ids=grid_ids(x),
            attention_mask=torch.cat([bias, bias.new_ones(image.shape[:2])], 1),
        ).sample
        return unpacked(output, x)

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0], BIAS: returned[2]}
