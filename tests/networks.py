"""Tiny networks of every family that fuse() knows, with every weight random, and what they are called with."""

import edm_files
import edm_plain
import torch
from helpers import randomised, seeded

from emd_fast.teachers.small_unet import SmallUNet

BATCH = 3


def _diffusers():
    import diffusers

    return diffusers


def unet2d(attention=True, **options):
    down = ("DownBlock2D", "AttnDownBlock2D" if attention else "DownBlock2D")
    up = ("AttnUpBlock2D" if attention else "UpBlock2D", "UpBlock2D")
    defaults = {"block_out_channels": (16, 32), "down_block_types": down, "up_block_types": up}
    return _diffusers().UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        add_attention=attention, **{**defaults, **options},
    )  # fmt: skip


def unet2d_condition(**options):
    defaults = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return _diffusers().UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=24, **{**defaults, **options},
    )  # fmt: skip


_TINY = {**edm_files.TINY, "label_dim": 10}


def _one_hot(g):
    return _levels(g), torch.eye(10)[torch.randint(10, (BATCH,), generator=g)]


def _levels(g):
    return torch.randn(BATCH, generator=g)


def _labelled(g):
    return _levels(g), torch.randint(10, (BATCH,), generator=g)


def _steps(g):
    return torch.randint(1000, (BATCH,), generator=g)


def own_edm(name):
    """Those of emd_fast.teachers, of the sizes of tests/edm_files.py."""
    _, kind, more = edm_files.NETWORKS[name]
    sizes = {**edm_files.TINY, **more, "label_dim": 10}
    return kind(edm_files._ARGUMENTS[kind](**sizes))


# name: (network, channels of x, arguments after x)
FAMILIES = {
    "unet2d": (unet2d, 3, lambda g: (_steps(g),)),
    "unet2d, no attention, classes": (
        lambda: unet2d(False, num_class_embeds=10),
        3,
        lambda g: (_steps(g), torch.randint(10, (BATCH,), generator=g)),
    ),
    "unet2d, scale_shift, resnet": (
        lambda: unet2d(
            resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet", num_class_embeds=10
        ),
        3,
        lambda g: (_steps(g), torch.randint(10, (BATCH,), generator=g)),
    ),
    "unet2d_condition": (unet2d_condition, 4, lambda g: (_steps(g), torch.randn(BATCH, 77, 24, generator=g))),
    "unet2d_condition, linear, scale_shift": (
        lambda: unet2d_condition(use_linear_projection=True, resnet_time_scale_shift="scale_shift"),
        4,
        lambda g: (_steps(g), torch.randn(BATCH, 77, 24, generator=g)),
    ),
    "song": (lambda: edm_plain.SongUNet(**_TINY), 3, _one_hot),
    "dhariwal": (lambda: edm_plain.DhariwalUNet(**_TINY, channels_per_head=8), 3, _one_hot),
    "edm precond": (
        lambda: edm_plain.EDMPrecond(edm_plain.SongUNet(**_TINY)),
        3,
        lambda g: (_levels(g).exp(), _one_hot(g)[1]),
    ),
    "edm2": (lambda: edm_plain.UNet(**_TINY, channels_per_head=8), 3, _one_hot),
    "small": (lambda: SmallUNet(3), 3, _labelled),
}


# They call the ops of this library themselves, which have no float64.
OWN = {
    "own ddpm++": (lambda: own_edm("ddpmpp"), 3, _labelled),
    "own ncsn++": (lambda: own_edm("ncsnpp"), 3, _labelled),
    "own adm": (lambda: own_edm("adm"), 3, _labelled),
    "own edm2": (lambda: own_edm("edm2"), 3, _labelled),
}

# Half as deep, for what takes its time by the block: compilation.
SHALLOW = {
    "shallow unet2d": (
        lambda: unet2d(block_out_channels=(16,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)),
        *FAMILIES["unet2d"][1:],
    ),
    "shallow unet2d_condition": (
        lambda: unet2d_condition(
            block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",)
        ),
        *FAMILIES["unet2d_condition"][1:],
    ),
}


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
