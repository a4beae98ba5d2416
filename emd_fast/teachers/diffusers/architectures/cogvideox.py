"""CogVideoXTransformer3DModel: CogVideoX and CogVideoX 1.5, text to video."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import TOKENS, ConditionSpec
from emd_fast.teachers.diffusers.architectures.form import T5, Architecture, Config


class CogVideoXTransformer3DModel(Architecture):
    pipelines, schedulers = ("CogVideoXPipeline",), ("CogVideoXDDIMScheduler",)
    text = T5
    vaes = ("AutoencoderKLCogVideoX",)
    video = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.get("ofs_embed_dim") is not None:
            raise self.refuse("ofs_embed_dim", "a text-to-video network is")
        self.patch = (config["patch_size_t"] or 1, config["patch_size"], config["patch_size"])
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
        self.size = (frames + -frames % self.patch[0], config["sample_height"], config["sample_width"])
        self.takes = ConditionSpec.text(config["text_embed_dim"])

    def vae_scale(self, vae: Config) -> tuple[int, int]:
        return vae.get("temporal_compression_ratio", 4), super().vae_scale(vae)[1]

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        _, _, frames, height, width = x.shape
        output = model(
            x.transpose(1, 2),
            timestep=time,
            encoder_hidden_states=cond[TOKENS].to(x.dtype),
            image_rotary_emb=self._rotary(model, frames, height, width, x.device),
        ).sample
        return output.transpose(1, 2)

    def _rotary(self, model: Any, frames: int, height: int, width: int, device: torch.device) -> Any:
        if not self.config["use_rotary_positional_embeddings"]:
            return None
        from diffusers import CogVideoXPipeline

        # The method of the pipeline takes pixels; one latent as one pixel gives the same grid.
        stands_in: Any = SimpleNamespace(vae_scale_factor_spatial=1, transformer=model)
        return CogVideoXPipeline._prepare_rotary_positional_embeddings(stands_in, height, width, frames, device)

    def to_vae(self, latents: Tensor, vae: Any) -> Tensor:
        return latents / vae.config.scaling_factor

    def text_tokens(self) -> int:
        return int(self.config["max_text_seq_length"])

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return returned[0]
