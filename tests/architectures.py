"""A tiny network of each architecture of diffusers, its stock pipeline, and conditions for both."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers_folders as folders
import text_encoders as texts
import tiny_architectures as tiny
import torch

LENGTHS, NULL_LENGTHS = (5, 3), (2, 2)  # tokens of the prompts of the samples, of the null condition


@dataclass
class Row:
    """How a class is tested.

    Args:
        model: makes the network.
        pipeline: class of the stock pipeline.
        cond: (lengths) -> the condition as the teacher takes it.
        call: (cond, null or None) -> arguments of the pipeline; with null it guides.
        guidance: weight of the guided output, in our meaning; None for a pipeline that does not guide.
        size: height, width and frames in pixels.
        latents: (pipeline, latents of the pipeline) -> (B, C, H, W) or (B, C, F, H, W).
        scheduler: makes the scheduler.
        vae: makes the VAE. parts: other arguments of the pipeline's class.
        text: makes text encoders and tokenizers.
        null: lengths of the prompts of the null condition.
    """

    model: Callable[[], Any]
    pipeline: str
    cond: Callable[[tuple[int, ...]], Any]
    call: Callable[[Any, Any], dict[str, Any]]
    guidance: float | None = 3.0
    size: dict[str, int] = field(default_factory=lambda: {"height": 64, "width": 96})
    latents: Callable[[Any, Any], Any] = lambda pipeline, latents: latents
    scheduler: Callable[[], Any] = lambda: tiny.flow()
    vae: Callable[[], Any] = lambda: tiny.vae()()
    parts: dict[str, Any] = field(default_factory=dict)
    null: tuple[int, ...] = NULL_LENGTHS
    text: Callable[[], dict[str, Any]] | None = None


def names_of(row):
    cond = row.cond(LENGTHS)
    return set(cond) if isinstance(cond, dict) else {"prompt_embeds"}


# Names of our conditions in the arguments of the pipelines.
NAMES = {
    "prompt_embeds": "prompt_embeds",
    "prompt_mask": "prompt_attention_mask",
    "prompt_bias": "prompt_attention_mask",
    "pooled_projections": "pooled_prompt_embeds",
}


def called(weight, plain=None, mask="prompt_attention_mask", **always):
    """Arguments of a pipeline for our conditions.

    Args:
        weight: its argument for guidance. plain: arguments without guidance; that weight of 1 when None.
        mask: its argument for the mask. always: further arguments.
    """

    def call(cond, null):
        asked = dict(always)
        for each, prefix in ((cond, ""), (null, "negative_")):
            for name, value in ({"prompt_embeds": each} if isinstance(each, torch.Tensor) else each or {}).items():
                if name in NAMES:
                    asked[prefix + (mask if name == "prompt_mask" else NAMES[name])] = value
        return {**asked, **({weight: 1.0} if plain is None else plain if null is None else {})} | (
            {} if null is None else {weight: 3.0}
        )

    return call


VIDEO = {"height": 64, "width": 96, "frames": 9}
GUIDANCE = {"guidance": torch.full((tiny.B,), 2.5)}
EQUAL = (5, 1)  # lengths of a null condition for pipelines that want it padded as the condition is
TRUE = {"weight": "true_cfg_scale", "plain": {}}
PLAIN = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}

ROWS = {
    "UNet2DConditionModel, XL": Row(
        tiny.sdxl,
        "StableDiffusionXLPipeline",
        tiny.sdxl_cond,
        called("guidance_scale"),
        scheduler=tiny.chain,
        text=lambda: texts.parts(texts.clip(8), texts.clip(8, 16)),
    ),
    "UNet2DConditionModel, XL with statistics of latents": Row(
        tiny.sdxl,
        "StableDiffusionXLPipeline",
        tiny.sdxl_cond,
        called("guidance_scale"),
        scheduler=tiny.chain,
        vae=tiny.vae(**tiny.STATISTICS),
    ),
    "SD3Transformer2DModel": Row(
        folders.sd3_transformer,
        "StableDiffusion3Pipeline",
        lambda lengths: {"prompt_embeds": tiny.embeds(lengths, 16), "pooled_projections": tiny.pooled(lengths, 16)},
        called("guidance_scale"),
        vae=tiny.vae(shift_factor=0.1),
        text=lambda: texts.parts(texts.clip(8, 8), texts.clip(8, 8), texts.t5(16)),
    ),
    "FluxTransformer2DModel": Row(
        tiny.flux,
        "FluxPipeline",
        lambda lengths: {**tiny.flux_cond(lengths), **GUIDANCE},
        called(**TRUE, guidance_scale=2.5),
        latents=tiny.unpacked,
        vae=tiny.vae(shift_factor=0.1),
        text=lambda: texts.parts(texts.clip(16), texts.t5(24)),
    ),
    "FluxTransformer2DModel, schnell": Row(
        lambda: tiny.flux(False),
        "FluxPipeline",
        tiny.flux_cond,
        called(**TRUE),
        latents=tiny.unpacked,
        vae=tiny.vae(shift_factor=0.1),
    ),
    "QwenImageTransformer2DModel": Row(
        tiny.qwen,
        "QwenImagePipeline",
        lambda lengths: tiny.masked(lengths, 24),
        called(**TRUE, mask="prompt_embeds_mask"),
        latents=lambda pipeline, latents: tiny.unpacked(pipeline, latents)[:, :, 0],
        vae=tiny.vae("AutoencoderKLQwenImage"),
        text=lambda: texts.parts(texts.qwen_vl(24)),
    ),
    "WanTransformer3DModel": Row(
        tiny.wan,
        "WanPipeline",
        lambda lengths: tiny.embeds(lengths, 24),
        called("guidance_scale"),
        size=VIDEO,
        vae=tiny.vae("AutoencoderKLWan"),
        text=lambda: texts.parts(texts.t5(24, "UMT5EncoderModel")),
    ),
    "WanTransformer3DModel, 2.2 5B": Row(
        tiny.wan,
        "WanPipeline",
        lambda lengths: tiny.embeds(lengths, 24),
        called("guidance_scale"),
        size=VIDEO,
        vae=tiny.vae("AutoencoderKLWan"),
        parts={"expand_timesteps": True},
    ),
    "WanTransformer3DModel, 2.2 A14B": Row(
        tiny.wan,
        "WanPipeline",
        lambda lengths: tiny.embeds(lengths, 24),
        called("guidance_scale"),
        size=VIDEO,
        vae=tiny.vae("AutoencoderKLWan"),
        parts={"transformer_2": tiny.seeded(tiny.wan, seed=5), "boundary_ratio": 0.5},
    ),
    "Flux2Transformer2DModel": Row(
        tiny.flux2,
        "Flux2Pipeline",
        lambda lengths: {"prompt_embeds": tiny.embeds(lengths, 24), **GUIDANCE},
        called("guidance_scale", {}, guidance_scale=2.5),
        guidance=None,
        latents=tiny.flux2_latents,
        vae=tiny.vae("AutoencoderKLFlux2"),
    ),
    "Flux2Transformer2DModel, klein": Row(
        lambda: tiny.flux2(False),
        "Flux2KleinPipeline",
        lambda lengths: tiny.embeds(lengths, 24),
        called("guidance_scale"),
        latents=tiny.flux2_latents,
        vae=tiny.vae("AutoencoderKLFlux2"),
        text=lambda: texts.parts(texts.qwen3(8, "Qwen3ForCausalLM", 28)),
    ),
    "ZImageTransformer2DModel": Row(
        tiny.zimage,
        "ZImagePipeline",
        lambda lengths: tiny.masked(lengths, 24),
        tiny.zimage_call,
        guidance=3.0,
        vae=tiny.vae(shift_factor=0.1),
        text=lambda: texts.parts(texts.qwen3(24)),
    ),
    "PixArtTransformer2DModel": Row(
        lambda: tiny.pixart(sample_size=8),
        "PixArtSigmaPipeline",
        lambda lengths: tiny.masked(lengths, 24),
        called("guidance_scale", **PLAIN),
        scheduler=tiny.chain,
        null=EQUAL,
        text=lambda: texts.parts(texts.t5(24)),
    ),
    "PixArtTransformer2DModel, alpha": Row(
        lambda: tiny.pixart(sample_size=128),
        "PixArtAlphaPipeline",
        tiny.pixart_alpha_cond,
        called("guidance_scale", **PLAIN),
        scheduler=tiny.chain,
        null=EQUAL,
        text=lambda: texts.parts(texts.t5(24)),
    ),
    "SanaTransformer2DModel": Row(
        tiny.sana,
        "SanaPipeline",
        lambda lengths: tiny.masked(lengths, 24),
        called("guidance_scale", **PLAIN),
        size={"height": 64, "width": 96},
        null=EQUAL,
        vae=tiny.vae("AutoencoderDC"),
        text=lambda: texts.parts(texts.gemma(24)),
    ),
    "Lumina2Transformer2DModel": Row(
        tiny.lumina2,
        "Lumina2Pipeline",
        lambda lengths: tiny.masked(lengths, 24),
        called("guidance_scale"),
        null=EQUAL,
        vae=tiny.vae(shift_factor=0.1),
        text=lambda: texts.parts(texts.gemma(24)),
    ),
    "LTXVideoTransformer3DModel": Row(
        tiny.ltx,
        "LTXPipeline",
        lambda lengths: tiny.masked(lengths, 24, rope_scale=torch.tensor([[8 / 25, 8, 8]]).repeat(tiny.B, 1)),
        called("guidance_scale"),
        size={"height": 64, "width": 96, "frames": 17},
        latents=tiny.ltx_latents,
        null=EQUAL,
        vae=tiny.vae("AutoencoderKLLTXVideo"),
        text=lambda: texts.parts(texts.t5(24)),
    ),
    "HunyuanVideoTransformer3DModel": Row(
        tiny.hunyuan,
        "HunyuanVideoPipeline",
        lambda lengths: tiny.masked(lengths, 24, pooled_projections=tiny.pooled(lengths, 16), **GUIDANCE),
        called(**TRUE, guidance_scale=2.5),
        size=VIDEO,
        vae=tiny.vae("AutoencoderKLHunyuanVideo"),
        text=lambda: texts.parts(texts.llama(24), texts.clip(16)),
    ),
    "CogVideoXTransformer3DModel": Row(
        lambda: tiny.cogvideox(max_text_seq_length=4),
        "CogVideoXPipeline",
        lambda lengths: tiny.embeds(lengths, 24),
        called("guidance_scale"),
        size=VIDEO,
        scheduler=tiny.cog_chain,
        latents=lambda pipeline, latents: latents.transpose(1, 2),
        vae=tiny.vae("AutoencoderKLCogVideoX"),
    ),
    "CogVideoXTransformer3DModel, 1.5": Row(
        lambda: tiny.cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2),
        "CogVideoXPipeline",
        lambda lengths: tiny.embeds(lengths, 24),
        called("guidance_scale"),
        size={**VIDEO, "frames": 13},
        scheduler=tiny.cog_chain,
        latents=lambda pipeline, latents: latents.transpose(1, 2),
        vae=tiny.vae("AutoencoderKLCogVideoX"),
        text=lambda: texts.parts(texts.t5(24)),
    ),
    "ChromaTransformer2DModel": Row(
        tiny.chroma,
        "ChromaPipeline",
        tiny.chroma_cond,
        called("guidance_scale"),
        latents=tiny.unpacked,
        vae=tiny.vae(shift_factor=0.1),
        text=lambda: texts.parts(texts.t5(24)),
        null=EQUAL,
    ),
}
