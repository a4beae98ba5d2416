"""ZImageTransformer2DModel: Z-Image. It takes lists, its time runs from noise to data, its output is negated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import MASK, TOKENS, ConditionSpec, lengths
from emd_fast.teachers.diffusers.architectures.form import Architecture, Config


class ZImageTransformer2DModel(Architecture):
    pipelines = ("ZImagePipeline",)
    text = ("Qwen3Model", "Qwen3ForCausalLM", "Qwen2Tokenizer", "Qwen2TokenizerFast")
    patch, size = (1, 2, 2), (1, 128, 128)
    unguided: Mapping[str, Any] = {"guidance_scale": 0.0}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.get("siglip_feat_dim") is not None:
            raise self.refuse("siglip_feat_dim", "a text-to-image network is")
        self.takes = ConditionSpec.text(config["cap_feat_dim"], masked=True)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        rows = zip(cond[TOKENS].to(x.dtype), lengths(cond[MASK]), strict=True)
        output = model(list(x[:, :, None]), (1000 - time) / 1000, [row[:length] for row, length in rows]).sample
        return -torch.stack(output)[:, :, 0]

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        found, _ = returned
        mask = [torch.ones(len(row), dtype=torch.bool, device=row.device) for row in found]
        return {TOKENS: pad_sequence(found, True), MASK: pad_sequence(mask, True)}
