"""Lumina2Transformer2DModel: Lumina Image 2. Its time runs from noise to data, its output is negated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import MASK, TOKENS, ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import GEMMA, Architecture, Config
from emd_fast.teachers.diffusers.architectures.packing import rescaled
from emd_fast.teachers.diffusers.shift import linear_mu


class Lumina2Transformer2DModel(Architecture):
    pipelines = ("Lumina2Pipeline",)
    text = GEMMA

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.patch = (1, config["patch_size"], config["patch_size"])
        self.takes = ConditionSpec.text(config["cap_feat_dim"], masked=True)

    def mu(self, shape: Sequence[int], scheduler: Config) -> float:
        # The pipeline takes the channels for the number of tokens.
        return linear_mu(scheduler, shape[0])

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return -model(
            x,
            timestep=1 - time / 1000,
            encoder_hidden_states=cond[TOKENS].to(x.dtype),
            encoder_attention_mask=cond[MASK],
        ).sample

    def rescale(self, guided: Tensor, conditional: Tensor) -> Tensor:
        """The guided output with the norm of the conditional one in each row of the latents."""
        return rescaled(guided, conditional)

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0], MASK: returned[1].bool()}
