"""LTXVideoTransformer3DModel: LTX-Video."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import MASK, TOKENS, ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import T5, Architecture, Config
from emd_fast.teachers.diffusers.architectures.packing import standardized

SCALE = "rope_scale"  # seconds, rows and columns of a step of the latents
_FRAME_RATE = 25  # the default of the pipeline


class LTXVideoTransformer3DModel(Architecture):
    pipelines = ("LTXPipeline",)
    text = T5
    vaes = ("AutoencoderKLLTXVideo",)
    size = (21, 16, 22)
    video = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if (config["patch_size"], config["patch_size_t"]) != (1, 1):
            raise self.refuse("patch_size", "patches of one latent are")
        self.takes = ConditionSpec.text(config["caption_channels"], {SCALE: (3,)}, masked=True)

    def vae_scale(self, vae: Config) -> tuple[int, int]:
        halves = sum(vae.get("spatio_temporal_scaling", (True, True, True, False)))
        every, side = (vae.get(key, patch) * 2**halves for key, patch in (("patch_size_t", 1), ("patch_size", 4)))
        return vae.get("temporal_compression_ratio") or every, vae.get("spatial_compression_ratio") or side

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        frames, height, width = x.shape[2:]
        output = model(
            x.flatten(2).transpose(1, 2),
            timestep=time,
            encoder_hidden_states=cond[TOKENS].to(x.dtype),
            encoder_attention_mask=cond[MASK],
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=cond[SCALE][0],
        ).sample
        return output.transpose(1, 2).reshape(x.shape)

    def constants(self, shape: Sequence[int], vae: Config, guidance: float | None) -> dict[str, Any]:
        every, side = self.vae_scale(vae)
        return {SCALE: [every / _FRAME_RATE, side, side]}

    def decode(self, latents: Tensor, vae: Any) -> Tensor:
        scaled = standardized(latents / vae.config.scaling_factor, vae.latents_mean, vae.latents_std)
        video: Tensor = vae.decode(
            scaled, latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        ).sample
        return video

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0], MASK: returned[1].bool()}
