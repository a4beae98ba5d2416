"""A tiny network of each architecture of diffusers, its stock pipeline, and conditions for both."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import diffusers_folders as folders
import text_encoders as texts
import torch

B, LENGTHS, NULL_LENGTHS = 2, (5, 3), (2, 2)  # samples; tokens of their prompts, of the null condition


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
    scheduler: Callable[[], Any] = lambda: flow()
    vae: Callable[[], Any] = lambda: vae()()
    parts: dict[str, Any] = field(default_factory=dict)
    null: tuple[int, ...] = NULL_LENGTHS
    text: Callable[[], dict[str, Any]] | None = None


def seeded(make):
    """Makes a network whose tensors are all random: some are zeros at first, which would hide what goes into them."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tokens(lengths, width, seed=0):
    """Embeddings (B, tokens, width) of prompts of these lengths, padded with zeros, and their mask."""
    generator = torch.Generator().manual_seed(seed + sum(lengths))
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), max(lengths), width, generator=generator) * mask[..., None], mask


def pooled(lengths, width):
    return torch.randn(len(lengths), width, generator=torch.Generator().manual_seed(7 + sum(lengths)))


def unpacked(pipeline, latents, height=64, width=96):
    return pipeline._unpack_latents(latents, height, width, 8)


def embeds(lengths, width):
    """Embeddings of prompts of one length, without a mask."""
    return tokens((4,) * len(lengths), width, sum(lengths))[0]


def masked(lengths, width, **others):
    found, mask = tokens(lengths, width)
    return {"prompt_embeds": found, "prompt_mask": mask, **others}


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


def sdxl():
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    heads = {"cross_attention_dim": 16, "attention_head_dim": 2, "use_linear_projection": True}
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added["projection_class_embeddings_input_dim"] = 16 + 6 * 8
    return diffusers.UNet2DConditionModel(**folders.SMALL, **heads, **added, down_block_types=down, up_block_types=up)


def sdxl_cond(lengths):
    sizes = torch.tensor([[64.0, 96, 0, 0, 64, 96]]).repeat(B, 1)
    return {"prompt_embeds": embeds(lengths, 16), "pooled_projections": pooled(lengths, 16), "time_ids": sizes}


HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
AXES = {"axes_dims_rope": (4, 6, 6)}


def flux(guidance_embeds=True):
    widths = {"in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 16}
    layers = {"num_layers": 2, "num_single_layers": 2}
    return diffusers.FluxTransformer2DModel(**HEADS, **AXES, **widths, **layers, guidance_embeds=guidance_embeds)


def flux_cond(lengths):
    return {"prompt_embeds": embeds(lengths, 24), "pooled_projections": pooled(lengths, 16)}


def flux2(guidance_embeds=True):
    layers = {"num_layers": 2, "num_single_layers": 2, "timestep_guidance_channels": 32}
    widths = {"in_channels": 16, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4)}
    return diffusers.Flux2Transformer2DModel(**HEADS, **widths, **layers, guidance_embeds=guidance_embeds)


def flux2_latents(pipeline, latents):
    return latents.transpose(1, 2).reshape(B, 16, 4, 6)


def qwen():
    widths = {"in_channels": 16, "out_channels": 4, "joint_attention_dim": 24, "num_layers": 2}
    return diffusers.QwenImageTransformer2DModel(**HEADS, **AXES, **widths)


def chroma():
    widths = {"in_channels": 16, "joint_attention_dim": 24, "num_layers": 2, "num_single_layers": 2}
    approximator = {"approximator_num_channels": 16, "approximator_hidden_dim": 32, "approximator_layers": 2}
    return diffusers.ChromaTransformer2DModel(**HEADS, **AXES, **widths, **approximator)


def chroma_cond(lengths):
    found, mask = tokens(lengths, 24)
    return {"prompt_embeds": found, "prompt_bias": mask.float()}


def wan(channels=4):
    widths = {"in_channels": channels, "out_channels": channels, "text_dim": 24, "freq_dim": 32, "ffn_dim": 48}
    return diffusers.WanTransformer3DModel(**HEADS, **widths, num_layers=2, rope_max_seq_len=32)


def zimage():
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    return diffusers.ZImageTransformer2DModel(**sizes, cap_feat_dim=24, axes_dims=[4, 6, 6], axes_lens=[64, 32, 32])


def zimage_call(cond, null):
    def rows(each):
        return [row[mask] for row, mask in zip(each["prompt_embeds"], each["prompt_mask"], strict=True)]

    if null is None:
        return {"prompt_embeds": rows(cond), "guidance_scale": 0.0}
    return {"prompt_embeds": rows(cond), "negative_prompt_embeds": rows(null), "guidance_scale": 2.0}


def pixart(**options):
    widths = {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 48, "caption_channels": 24}
    heads = {**HEADS, "num_attention_heads": 3}
    return diffusers.PixArtTransformer2DModel(**heads, **widths, num_layers=2, norm_num_groups=4, **options)


def pixart_alpha_cond(lengths):
    sizes = {"resolution": torch.tensor([[64.0, 96]]).repeat(B, 1), "aspect_ratio": torch.full((B, 1), 64 / 96)}
    return masked(lengths, 24, **sizes)


def sana():
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32}
    widths = {"in_channels": 4, "out_channels": 4, "caption_channels": 24, "sample_size": 8}
    return diffusers.SanaTransformer2DModel(**HEADS, **cross, **widths, num_layers=2, timestep_scale=0.7)


def lumina2():
    widths = {"in_channels": 4, "hidden_size": 32, "cap_feat_dim": 24, "sample_size": 8, "multiple_of": 16}
    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "axes_dim_rope": (4, 6, 6), "axes_lens": (300, 32, 32)}
    return diffusers.Lumina2Transformer2DModel(**widths, **heads, num_layers=2, num_refiner_layers=1)


def ltx():
    widths = {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "caption_channels": 24}
    return diffusers.LTXVideoTransformer3DModel(**HEADS, **widths, num_layers=2)


def ltx_latents(pipeline, latents):
    return pipeline._unpack_latents(latents, 3, 8, 12)


def hunyuan(guidance_embeds=True):
    widths = {"in_channels": 4, "out_channels": 4, "text_embed_dim": 24, "pooled_projection_dim": 16}
    layers = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)}
    return diffusers.HunyuanVideoTransformer3DModel(**HEADS, **widths, **layers, guidance_embeds=guidance_embeds)


def cogvideox(**options):
    widths = {
        "in_channels": 4,
        "out_channels": 4,
        "text_embed_dim": 24,
        "time_embed_dim": 16,
    }
    sizes = {"sample_width": 12, "sample_height": 8, "sample_frames": 9}
    return diffusers.CogVideoXTransformer3DModel(**HEADS, **widths, **sizes, num_layers=2, **options)


STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.05], "latents_std": [0.5, 2.0, 1.5, 0.8]}


def vae(kind="AutoencoderKL", **options):
    """Makes a VAE of 4 channels whose latents are 8 times smaller."""
    blocks = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    causal = {"base_dim": 3, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 1, **STATISTICS}
    deep = {"latent_channels": 4, "attention_head_dim": 2}
    deep |= {f"{half}_block_out_channels": (8,) * 4 for half in ("encoder", "decoder")}
    deep |= {f"{half}_block_types": "ResBlock" for half in ("encoder", "decoder")}
    deep |= {f"{half}_layers_per_block": (1,) * 4 for half in ("encoder", "decoder")}
    deep |= {f"{half}_qkv_multiscales": ((),) * 4 for half in ("encoder", "decoder")}
    down, up = (("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4)
    flat = {**blocks, "down_block_types": down, "up_block_types": up}
    ltx_blocks = {"block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "latent_channels": 4}
    ltx_blocks |= {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "patch_size": 1}
    ltx_blocks |= dict.fromkeys(
        ("spatio_temporal_scaling", "decoder_spatio_temporal_scaling"), (True, True, True, False)
    )
    kinds = {
        "AutoencoderKL": {**flat, "scaling_factor": 0.5},
        "AutoencoderKLFlux2": flat,
        "AutoencoderKLQwenImage": causal,
        "AutoencoderKLWan": causal,
        "AutoencoderDC": deep,
        "AutoencoderKLLTXVideo": ltx_blocks,
        "AutoencoderKLHunyuanVideo": blocks,
        "AutoencoderKLCogVideoX": blocks,
    }

    def make():
        torch.manual_seed(1)
        made = getattr(diffusers, kind)(**kinds[kind] | options).eval()
        for name, buffer in made.named_buffers():
            if name in ("bn.running_mean", "bn.running_var", "latents_mean", "latents_std"):
                buffer.uniform_(0.5, 2.0)
        return made

    return make


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def chain():
    return diffusers.DDIMScheduler(**folders.BETAS)


def cog_chain():
    return diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)


VIDEO = {"height": 64, "width": 96, "frames": 9}
GUIDANCE = {"guidance": torch.full((B,), 2.5)}
EQUAL = (5, 1)  # lengths of a null condition for pipelines that want it padded as the condition is
TRUE = {"weight": "true_cfg_scale", "plain": {}}
PLAIN = {"use_resolution_binning": False, "clean_caption": False, "negative_prompt": None}

ROWS = {
    "UNet2DConditionModel, XL": Row(
        sdxl,
        "StableDiffusionXLPipeline",
        sdxl_cond,
        called("guidance_scale"),
        scheduler=chain,
        text=lambda: texts.parts(texts.clip(8), texts.clip(8, 16)),
    ),
    "UNet2DConditionModel, XL with statistics of latents": Row(
        sdxl,
        "StableDiffusionXLPipeline",
        sdxl_cond,
        called("guidance_scale"),
        scheduler=chain,
        vae=vae(**STATISTICS),
    ),
    "FluxTransformer2DModel": Row(
        flux,
        "FluxPipeline",
        lambda lengths: {**flux_cond(lengths), **GUIDANCE},
        called(**TRUE, guidance_scale=2.5),
        latents=unpacked,
        vae=vae(shift_factor=0.1),
        text=lambda: texts.parts(texts.clip(16), texts.t5(24)),
    ),
    "FluxTransformer2DModel, schnell": Row(
        lambda: flux(False),
        "FluxPipeline",
        flux_cond,
        called(**TRUE),
        latents=unpacked,
        vae=vae(shift_factor=0.1),
    ),
    "QwenImageTransformer2DModel": Row(
        qwen,
        "QwenImagePipeline",
        lambda lengths: masked(lengths, 24),
        called(**TRUE, mask="prompt_embeds_mask"),
        latents=lambda pipeline, latents: unpacked(pipeline, latents)[:, :, 0],
        vae=vae("AutoencoderKLQwenImage"),
        text=lambda: texts.parts(texts.qwen_vl(24)),
    ),
    "WanTransformer3DModel": Row(
        wan,
        "WanPipeline",
        lambda lengths: embeds(lengths, 24),
        called("guidance_scale"),
        size=VIDEO,
        vae=vae("AutoencoderKLWan"),
        text=lambda: texts.parts(texts.t5(24, "UMT5EncoderModel")),
    ),
    "WanTransformer3DModel, 2.2 5B": Row(
        wan,
        "WanPipeline",
        lambda lengths: embeds(lengths, 24),
        called("guidance_scale"),
        size=VIDEO,
        vae=vae("AutoencoderKLWan"),
        parts={"expand_timesteps": True},
    ),
    "Flux2Transformer2DModel": Row(
        flux2,
        "Flux2Pipeline",
        lambda lengths: {"prompt_embeds": embeds(lengths, 24), **GUIDANCE},
        called("guidance_scale", {}, guidance_scale=2.5),
        guidance=None,
        latents=flux2_latents,
        vae=vae("AutoencoderKLFlux2"),
    ),
    "Flux2Transformer2DModel, klein": Row(
        lambda: flux2(False),
        "Flux2KleinPipeline",
        lambda lengths: embeds(lengths, 24),
        called("guidance_scale"),
        latents=flux2_latents,
        vae=vae("AutoencoderKLFlux2"),
        text=lambda: texts.parts(texts.qwen3(8, "Qwen3ForCausalLM", 28)),
    ),
    "ZImageTransformer2DModel": Row(
        zimage,
        "ZImagePipeline",
        lambda lengths: masked(lengths, 24),
        zimage_call,
        guidance=3.0,
        vae=vae(shift_factor=0.1),
        text=lambda: texts.parts(texts.qwen3(24)),
    ),
    "PixArtTransformer2DModel": Row(
        lambda: pixart(sample_size=8),
        "PixArtSigmaPipeline",
        lambda lengths: masked(lengths, 24),
        called("guidance_scale", **PLAIN),
        scheduler=chain,
        null=EQUAL,
        text=lambda: texts.parts(texts.t5(24)),
    ),
    "PixArtTransformer2DModel, alpha": Row(
        lambda: pixart(sample_size=128),
        "PixArtAlphaPipeline",
        pixart_alpha_cond,
        called("guidance_scale", **PLAIN),
        scheduler=chain,
        null=EQUAL,
        text=lambda: texts.parts(texts.t5(24)),
    ),
    "SanaTransformer2DModel": Row(
        sana,
        "SanaPipeline",
        lambda lengths: masked(lengths, 24),
        called("guidance_scale", **PLAIN),
        size={"height": 64, "width": 96},
        null=EQUAL,
        vae=vae("AutoencoderDC"),
        text=lambda: texts.parts(texts.gemma(24)),
    ),
    "Lumina2Transformer2DModel": Row(
        lumina2,
        "Lumina2Pipeline",
        lambda lengths: masked(lengths, 24),
        called("guidance_scale"),
        null=EQUAL,
        vae=vae(shift_factor=0.1),
        text=lambda: texts.parts(texts.gemma(24)),
    ),
    "LTXVideoTransformer3DModel": Row(
        ltx,
        "LTXPipeline",
        lambda lengths: masked(lengths, 24, rope_scale=torch.tensor([[8 / 25, 8, 8]]).repeat(B, 1)),
        called("guidance_scale"),
        size={"height": 64, "width": 96, "frames": 17},
        latents=ltx_latents,
        null=EQUAL,
        vae=vae("AutoencoderKLLTXVideo"),
        text=lambda: texts.parts(texts.t5(24)),
    ),
    "HunyuanVideoTransformer3DModel": Row(
        hunyuan,
        "HunyuanVideoPipeline",
        lambda lengths: masked(lengths, 24, pooled_projections=pooled(lengths, 16), **GUIDANCE),
        called(**TRUE, guidance_scale=2.5),
        size=VIDEO,
        vae=vae("AutoencoderKLHunyuanVideo"),
        text=lambda: texts.parts(texts.llama(24), texts.clip(16)),
    ),
    "CogVideoXTransformer3DModel": Row(
        lambda: cogvideox(max_text_seq_length=4),
        "CogVideoXPipeline",
        lambda lengths: embeds(lengths, 24),
        called("guidance_scale"),
        size=VIDEO,
        scheduler=cog_chain,
        latents=lambda pipeline, latents: latents.transpose(1, 2),
        vae=vae("AutoencoderKLCogVideoX"),
    ),
    "CogVideoXTransformer3DModel, 1.5": Row(
        lambda: cogvideox(use_rotary_positional_embeddings=True, patch_size_t=2),
        "CogVideoXPipeline",
        lambda lengths: embeds(lengths, 24),
        called("guidance_scale"),
        size={**VIDEO, "frames": 13},
        scheduler=cog_chain,
        latents=lambda pipeline, latents: latents.transpose(1, 2),
        vae=vae("AutoencoderKLCogVideoX"),
        text=lambda: texts.parts(texts.t5(24)),
    ),
    "ChromaTransformer2DModel": Row(
        chroma,
        "ChromaPipeline",
        chroma_cond,
        called("guidance_scale"),
        latents=unpacked,
        vae=vae(shift_factor=0.1),
        text=lambda: texts.parts(texts.t5(24)),
        null=EQUAL,
    ),
}
