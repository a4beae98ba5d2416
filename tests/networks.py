"""Tiny networks of every family that fuse() knows, with every weight random, and what they are called with."""

from functools import partial

import edm_files
import edm_plain
import torch
from helpers import randomised, seeded

from emd_fast.teachers.small_unet import SmallUNet

BATCH = 3


def unet2d(attention=True, **options):
    from diffusers import UNet2DModel

    down = ("DownBlock2D", "AttnDownBlock2D" if attention else "DownBlock2D")
    up = ("AttnUpBlock2D" if attention else "UpBlock2D", "UpBlock2D")
    defaults = {"block_out_channels": (16, 32), "down_block_types": down, "up_block_types": up}
    return UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        add_attention=attention, **{**defaults, **options},
    )  # fmt: skip


def unet2d_condition(**options):
    from diffusers import UNet2DConditionModel

    defaults = {"block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    defaults["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=24, **{**defaults, **options},
    )  # fmt: skip


_TINY = {**edm_files.TINY, "label_dim": 10}


def _levels(g):
    return torch.randn(BATCH, generator=g)


def _steps(g):
    return torch.randint(1000, (BATCH,), generator=g)


def _classes(g):
    return torch.randint(10, (BATCH,), generator=g)


def _one_hot(g):
    return _levels(g), torch.eye(10)[_classes(g)]


def _labelled(g):
    return _levels(g), _classes(g)


def _texts(g):
    return _steps(g), torch.randn(BATCH, 77, 24, generator=g)


def own_edm(name):
    """Those of emd_fast.teachers, of the sizes of tests/edm_files.py."""
    _, kind, more = edm_files.NETWORKS[name]
    return kind(edm_files._ARGUMENTS[kind](**{**_TINY, **more, "label_dim": 10}))


_ONE = {"block_out_channels": (16,), "up_block_types": ("UpBlock2D",)}
_RESNET = {"resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet"}
_LINEAR = {"use_linear_projection": True, "resnet_time_scale_shift": "scale_shift"}
# name: (network, channels of x, arguments after x)
FAMILIES = {
    "unet2d": (unet2d, 3, lambda g: (_steps(g),)),
    "unet2d, no attention, classes": (
        partial(unet2d, False, num_class_embeds=10), 3, lambda g: (_steps(g), _classes(g)),
    ),
    "unet2d, scale_shift, resnet": (
        partial(unet2d, num_class_embeds=10, **_RESNET), 3, lambda g: (_steps(g), _classes(g)),
    ),
    "unet2d_condition": (unet2d_condition, 4, _texts),
    "unet2d_condition, linear, scale_shift": (partial(unet2d_condition, **_LINEAR), 4, _texts),
    "song": (partial(edm_plain.SongUNet, **_TINY), 3, _one_hot),
    "dhariwal": (partial(edm_plain.DhariwalUNet, **_TINY, channels_per_head=8), 3, _one_hot),
    "edm precond": (
        lambda: edm_plain.EDMPrecond(edm_plain.SongUNet(**_TINY)), 3, lambda g: (_levels(g).exp(), _one_hot(g)[1]),
    ),
    "edm2": (partial(edm_plain.UNet, **_TINY, channels_per_head=8), 3, _one_hot),
    "small": (partial(SmallUNet, 3), 3, _labelled),
}  # fmt: skip
# They call the ops of this library themselves, which have no float64.
OWN = {
    f"own {name}": (partial(own_edm, file), 3, _labelled)
    for name, file in {"ddpm++": "ddpmpp", "ncsn++": "ncsnpp", "adm": "adm", "edm2": "edm2"}.items()
}
# Half as deep, for what takes its time by the block: compilation.
SHALLOW = {
    "shallow unet2d": (partial(unet2d, down_block_types=("DownBlock2D",), **_ONE), 3, FAMILIES["unet2d"][2]),
    "shallow unet2d_condition": (
        partial(unet2d_condition, down_block_types=("CrossAttnDownBlock2D",), **_ONE), 4, _texts,
    ),
}  # fmt: skip


def make(name, seed=0):
    """The network, in eval mode, every weight random; x; the arguments after it."""
    build, channels, arguments = (FAMILIES | OWN | SHALLOW)[name]
    torch.manual_seed(seed)  # buffers
    network = randomised(build(), seed).eval()
    g = seeded(seed + 1)
    return network, torch.randn(BATCH, channels, 8, 8, generator=g), arguments(g)


def output(network, x, arguments):
    out = network(x, *arguments)
    return out if isinstance(out, torch.Tensor) else out.sample
