"""Tiny folders in the formats of diffusers, with weights drawn here: nothing is downloaded."""

import json

import torch

SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
LATENT = {"attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 2}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TOKENS = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}


def transformers_missing():
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        return "transformers is not installed: there is no text encoder to make"
    return None


def unet(folder, scheduler=None, **changes):
    """A DDPM pipeline of a UNet2DModel, 3x8x8."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    model = UNet2DModel(**SMALL, attention_head_dim=8, down_block_types=down, up_block_types=up, **changes)
    DDPMPipeline(model, scheduler or DDPMScheduler()).save_pretrained(folder)
    return folder


def vae(channels=4, **changes):
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 16), "latent_channels": channels, "norm_num_groups": 4, "scaling_factor": 0.5}
    return AutoencoderKL(**blocks, **sizes, **changes)


def dit(folder, scheduler=None):
    """A DiT pipeline: ten labels, a learned variance, a VAE."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(2)
    sizes = {"num_attention_heads": 2, "out_channels": 8, "num_embeds_ada_norm": 10, "norm_num_groups": 4}
    model = DiTTransformer2DModel(**LATENT, **sizes)
    DiTPipeline(model, vae(), scheduler or DDIMScheduler(), id2label=None).save_pretrained(folder)
    return folder


def text_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(3)
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    heads = {"cross_attention_dim": 8, "attention_head_dim": 2}
    return UNet2DConditionModel(**SMALL, **heads, down_block_types=down, up_block_types=up)


def tokenizer(folder):
    """A CLIP tokenizer whose words are single letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(ord("a") + i) for i in range(26)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)


def text_encoder(projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(4)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=54, max_position_embeddings=12, projection_dim=8, **sizes, **TOKENS)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def stable_diffusion(folder, scheduler=None):
    """A Stable Diffusion pipeline. Needs transformers."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    made = {"vae": vae(), "text_encoder": text_encoder(), "tokenizer": tokenizer(folder / "made"), "unet": text_unet()}
    made["scheduler"] = scheduler or PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**made, **without).save_pretrained(folder)
    return folder


def sd3_transformer():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(5)
    sizes = dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), 16)
    return SD3Transformer2DModel(**LATENT, **sizes, num_attention_heads=2, out_channels=4, pos_embed_max_size=8)


def sd3(folder):
    """A Stable Diffusion 3 pipeline without its T5. Needs transformers."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    words, scheduler = tokenizer(folder / "made"), FlowMatchEulerDiscreteScheduler(shift=3.0)
    text = {"text_encoder_3": None, "tokenizer_3": None, "tokenizer": words, "tokenizer_2": words}
    text |= {name: text_encoder(projection=True) for name in ("text_encoder", "text_encoder_2")}
    made = StableDiffusion3Pipeline(sd3_transformer(), scheduler, vae(shift_factor=0.1), **text)
    made.save_pretrained(folder)
    return folder


def bare_text_unet(folder):
    """A UNet2DConditionModel and its scheduler: embeddings have to come from elsewhere."""
    from diffusers import PNDMScheduler

    return bare(text_unet(), PNDMScheduler(**BETAS), folder)


def bare_sd3(folder):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return bare(sd3_transformer(), FlowMatchEulerDiscreteScheduler(shift=3.0), folder)


def bare(model, scheduler, folder):
    """A model folder with its scheduler beside the weights."""
    model.save_pretrained(folder)
    scheduler.save_pretrained(folder)
    return folder
