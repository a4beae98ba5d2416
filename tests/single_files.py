"""Single-file checkpoints of tiny networks, under the names of the code that Stable Diffusion was published with."""

import re

import torch
from diffusers_folders import SMALL

_EMBEDDINGS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet(state):
    """A UNet2DConditionModel of `SMALL`."""
    return {f"model.diffusion_model.{_unet_name(name)}": value for name, value in state.items()}


def _unet_name(name):
    stem, _, kind = name.rpartition(".")
    if stem in _EMBEDDINGS:
        return f"{_EMBEDDINGS[stem]}.{kind}"
    per_block = SMALL["layers_per_block"] + 1
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", stem):
        way, block, part, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        number = block * per_block + layer + (way == "down")
        rest = _RESNET[rest] if part == "resnets" else rest
        blocks = {"down": "input_blocks", "up": "output_blocks"}[way]
        return f"{blocks}.{number}.{int(part == 'attentions')}.{rest}.{kind}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv", stem):
        last = int(match[2]) * per_block + per_block - 1
        # Up block 0 has attentions in this network, so that its upsampler is the third.
        return f"input_blocks.{last + 1}.0.op.{kind}" if match[1] == "down" else f"output_blocks.{last}.2.conv.{kind}"
    match = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", stem)
    number = {"resnets": 2 * int(match[2]), "attentions": 1}[match[1]]
    return f"middle_block.{number}.{_RESNET.get(match[3], match[3]) if match[1] == 'resnets' else match[3]}.{kind}"


def vae(state, blocks=2, prefix="first_stage_model."):
    """An AutoencoderKL, whose attention has convolutions in these files."""
    new = {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        stem = stem.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        stem = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", stem)
        stem = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", stem)
        stem = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{blocks - 1 - int(m[1])}.block", stem)
        stem = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", stem)
        stem = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", stem)
        if match := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)", stem):
            stem = f"{match[1]}.mid.attn_1.{_ATTENTION[match[2]]}"
            value = value[:, :, None, None] if value.dim() == 2 else value
        new[f"{prefix}{stem}.{kind}"] = value.contiguous()
    return new


def clip(state, prefix="cond_stage_model.transformer."):
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}


_OPEN_CLIP = {
    "embeddings.token_embedding": "token_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "encoder.layers.": "transformer.resblocks.",
}


def open_clip(state, prefix="cond_stage_model.model."):
    """The text encoder of Stable Diffusion 2: one matrix for queries, keys and values."""
    new, fused = {}, {}
    for name, value in state.items():
        name = name.removeprefix("text_model.")
        if match := re.fullmatch(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            fused.setdefault(f"{match[1]}.attn.in_proj_{match[3]}", {})[match[2]] = value
            continue
        name = "positional_embedding" if name == "embeddings.position_embedding.weight" else name
        new[name] = value
    new |= {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in fused.items()}
    named = {}
    for name, value in new.items():
        for theirs, ours in _OPEN_CLIP.items():
            name = name.replace(theirs, ours)
        named[prefix + name] = value
    return named | {f"{prefix}logit_scale": torch.ones(())}


def sd3(state, layers=2):
    """An SD3Transformer2DModel: fused queries, keys and values, and shift before scale at its end."""
    own = {
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    block = {
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    new, fused = {"pos_embed": state["pos_embed.pos_embed"]}, {}
    for name, value in state.items():
        stem, _, kind = name.rpartition(".")
        match = re.fullmatch(r"transformer_blocks\.(\d)\.(.+)", stem)
        if stem in own:
            name = f"{own[stem]}.{kind}"
        elif match and (qkv := re.fullmatch(r"attn\.(?:to_([qkv])|add_([qkv])_proj)", match[2])):
            side = "x_block" if qkv[1] else "context_block"
            fused.setdefault(f"joint_blocks.{match[1]}.{side}.attn.qkv.{kind}", {})[qkv[1] or qkv[2]] = value
            continue
        elif match:
            name = f"joint_blocks.{match[1]}.{block[match[2]]}.{kind}"
        else:
            continue
        is_last = name.startswith((f"joint_blocks.{layers - 1}.context_block.adaLN", "final_layer.adaLN"))
        new[name] = torch.cat(value.chunk(2)[::-1]) if is_last else value
    new |= {name: torch.cat([parts[letter] for letter in "qkv"]) for name, parts in fused.items()}
    return {f"model.diffusion_model.{name}": value.contiguous() for name, value in new.items()}
