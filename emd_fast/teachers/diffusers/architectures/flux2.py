"""Flux2Transformer2DModel: Flux.2. A sample is the normalised latents in 2x2 patches, 128 channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.conditions import GUIDANCE, TOKENS, ConditionSpec, Rows
from emd_fast.teachers.diffusers.architectures.form import Config
from emd_fast.teachers.diffusers.architectures.packing import PackedImage, standardized

_STEPS = 50  # the default of the pipelines


class Flux2Transformer2DModel(PackedImage):
    vaes = ("AutoencoderKLFlux2",)
    patch, size = (1, 1, 1), (1, 64, 64)
    guidance = 4.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        embeds = config["guidance_embeds"]
        self.pipelines = ("Flux2Pipeline",) if embeds else ("Flux2KleinPipeline",)
        encoder = ("Mistral3ForConditionalGeneration", "PixtralProcessor")
        self.text = encoder if embeds else ("Qwen3ForCausalLM", "Qwen2Tokenizer", "Qwen2TokenizerFast")
        others: Rows = {GUIDANCE: ()} if embeds else {}
        self.takes = ConditionSpec.text(config["joint_attention_dim"], others)

    @property
    def channels(self) -> int:
        return int(self.config["in_channels"])

    @property
    def returned(self) -> int:
        return int(self.config["out_channels"] or self.config["in_channels"])

    def vae_channels(self, vae: Any) -> int:
        return 4 * int(vae.latent_channels)

    def vae_scale(self, vae: Config) -> tuple[int, int]:
        return 1, 2 * super().vae_scale(vae)[1]

    def mu(self, shape: Sequence[int], scheduler: Config) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(self.tokens(shape), _STEPS)

    def call(self, model: Any, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        tokens = cond[TOKENS].to(x.dtype)
        one, height, width = (torch.arange(size, device=x.device) for size in (1, *x.shape[2:]))
        output = model(
            x.flatten(2).transpose(1, 2),
            timestep=time / 1000,
            guidance=cond.get(GUIDANCE),
            encoder_hidden_states=tokens,
            txt_ids=torch.cartesian_prod(one, one, one, torch.arange(tokens.shape[1], device=x.device)),
            img_ids=torch.cartesian_prod(one, height, width, one),
        ).sample
        return output.transpose(1, 2).reshape(x.shape)

    def to_vae(self, latents: Tensor, vae: Any) -> Tensor:
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        patches = standardized(latents, vae.bn.running_mean, std)
        b, c, h, w = patches.shape
        return patches.reshape(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        return {TOKENS: returned[0]} if GUIDANCE in self.takes.tensors else returned[0]
