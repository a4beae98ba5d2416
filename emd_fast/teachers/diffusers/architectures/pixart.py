"""PixArtTransformer2DModel: PixArt-alpha and PixArt-Sigma, with a learned variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import MASK, TOKENS, ConditionSpec, Rows, in_dtype
from emd_fast.teachers.diffusers.architectures.form import T5, Architecture, Config

RESOLUTION, RATIO = "resolution", "aspect_ratio"  # height and width in pixels, height / width


class PixArtTransformer2DModel(Architecture):
    text = T5
    schedulers = ("DDIMScheduler", "EulerDiscreteScheduler")
    cuts_variance = True
    unguided: Mapping[str, Any] = {"guidance_scale": 1.0, "use_resolution_binning": False}

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        asked = config["use_additional_conditions"]
        sized = config["sample_size"] == 128 if asked is None else asked
        self.pipelines = ("PixArtAlphaPipeline",) if sized else ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
        self.patch = (1, config["patch_size"], config["patch_size"])
        others: Rows = {RESOLUTION: (2,), RATIO: (1,)} if sized else {}
        self.takes = ConditionSpec.text(config["caption_channels"], others, masked=True)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return model(
            x,
            timestep=time,
            encoder_hidden_states=in_dtype(cond[TOKENS], x.dtype),
            encoder_attention_mask=cond[MASK],
            added_cond_kwargs={name: cond.get(name) for name in (RESOLUTION, RATIO)},
        ).sample

    def of_size(self, shape: Sequence[int], vae: Config) -> dict[str, list[float]]:
        _, height, width = self.pixels(shape, vae)
        return {RESOLUTION: [height, width], RATIO: [height / width]} if RATIO in self.takes.tensors else {}

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0], MASK: returned[1].bool()}
