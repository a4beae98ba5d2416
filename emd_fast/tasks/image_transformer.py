"""A small transformer as the teacher of labelled images: DiT of diffusers on patches of 2x2 pixels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from emd_fast.config import TeacherConfig
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.schedules import EDM
from emd_fast.tasks.image_data import ImageData
from emd_fast.teachers.diffusers import architectures
from emd_fast.teachers.diffusers.folder import import_diffusers
from emd_fast.teachers.small_unet import initialise

_HEADS, _LAYERS, _PATCH = 4, 4, 2
_LARGEST_INDEX = 1000.0  # DiT's embedding of noise levels was made for indices from 0 to 1000


def untrained(config: TeacherConfig, data: ImageData) -> Denoiser:
    """Builds the denoiser with the weights of `config.seed` (noise stream 13), for sigma in [0.002, 80].

    The modulation of each block and the last layer start at zero, as in DiT, so the initial output
    is 0. With 16 channels it has 393 thousand parameters.

    Args:
        config: of which it uses channels, a quarter of the width, and seed.
        data: images of even height and width.

    Raises:
        ModuleNotFoundError: diffusers is not installed.
    """
    model: Any = import_diffusers().DiTTransformer2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=config.channels,
        in_channels=data.shape[0],
        out_channels=data.shape[0],
        num_layers=_LAYERS,
        sample_size=data.shape[1],
        patch_size=_PATCH,
        num_embeds_ada_norm=data.classes,
    )
    for layer in (*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_2):
        layer.starts_at_zero = True
    initialise(model, config.seed)
    network = architectures.network(model.eval())  # in training mode it drops labels at random
    return Denoiser(network, EDM(), "edm", sigma_data=data.sigma_data, c_noise=index_of, sample_shape=data.shape)


def index_of(t: Tensor) -> Tensor:
    """The input of the network (B,) for sigma t (B,): log sigma, from 0 to 1000 over EDM's range."""
    low, high = math.log(EDM.t_min), math.log(EDM.t_max)
    return _LARGEST_INDEX * (torch.log(t) - low) / (high - low)
