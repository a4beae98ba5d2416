"""ChromaTransformer2DModel: Chroma 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import MASK, TOKENS, ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import T5, Config
from emd_fast.teachers.diffusers.architectures.packing import PackedImage, grid_ids, packed, unpacked


class ChromaTransformer2DModel(PackedImage):
    pipelines = ("ChromaPipeline",)
    text = T5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.takes = ConditionSpec.text(config["joint_attention_dim"], masked=True)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        image, tokens, mask = packed(x), cond[TOKENS].to(x.dtype), cond[MASK]
        output = model(
            image,
            timestep=time / 1000,
            encoder_hidden_states=tokens,
            txt_ids=x.new_zeros(tokens.shape[1], 3),
            img_ids=grid_ids(x),
            attention_mask=torch.cat([mask, mask.new_ones(image.shape[:2])], 1),
        ).sample
        return unpacked(output, x)

    def encode(self, pipeline: Any, prompts: list[str], options: Mapping[str, Any]) -> Condition:
        tokens, _, mask, *_ = pipeline.encode_prompt(prompts, **options)
        return {TOKENS: tokens, MASK: mask.bool()}
