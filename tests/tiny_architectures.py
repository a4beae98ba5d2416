"""Tiny networks, VAEs and schedulers of the architectures of diffusers, and conditions that the networks take."""

import diffusers
import diffusers_folders as folders
import torch

B = 2  # samples


def seeded(make, seed=0):
    """Makes a network whose tensors are all random: some are zeros at first, which would hide what goes into them."""
    torch.manual_seed(seed)
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
    return diffusers.ZImageTransformer2DModel(**sizes, cap_feat_dim=24, axes_dims=[4, 6, 6], axes_lens=[640, 32, 32])


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
