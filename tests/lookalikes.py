"""Small networks of the published architectures of EDM and EDM2, for tests: the attributes are named as theirs are.

Written from the papers: Karras et al. (arXiv 2206.00364), Song et al. (arXiv 2011.13456), Dhariwal and Nichol (arXiv
2105.05233), Karras et al. (arXiv 2312.02696).
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from emd_fast.fusion.published import PUBLISHED, fingerprint

# EDM ----------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / math.sqrt(in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Conv2d(nn.Module):
    """A convolution with a box filter before (down) or after (up) it, or that alone where kernel is 0."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False):
        super().__init__()
        self.up, self.down, self.kernel = up, down, kernel
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(shape) / math.sqrt(in_channels * kernel**2)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None

    def forward(self, x):
        if self.up:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.down:
            x = F.avg_pool2d(x, 2)
        if self.weight is None:
            return x
        return F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=self.kernel // 2)


class GroupNorm(nn.Module):
    def __init__(self, num_channels, num_groups=32, min_channels_per_group=4, eps=1e-5):
        super().__init__()
        self.num_groups = min(num_groups, num_channels // min_channels_per_group)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(nn.Module):
    def __init__(
        self, in_channels, out_channels, emb_channels, up=False, down=False, attention=False, dropout=0.0,
        skip_scale=1.0, adaptive_scale=True, channels_per_head=8,
    ):  # fmt: skip
        super().__init__()
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.dropout, self.skip_scale, self.adaptive_scale = dropout, skip_scale, adaptive_scale
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up=up, down=down)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip = None
        if in_channels != out_channels or up or down:
            self.skip = Conv2d(in_channels, out_channels, int(in_channels != out_channels), up=up, down=down)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def forward(self, x, emb):
        before = x
        x = self.conv0(F.silu(self.norm0(x)))
        params = self.affine(emb)[:, :, None, None].to(x.dtype)
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            x = F.silu(shift + self.norm1(x) * (scale + 1))
        else:
            x = F.silu(self.norm1(x + params))
        x = self.conv1(F.dropout(x, p=self.dropout, training=self.training))
        x = (x + (before if self.skip is None else self.skip(before))) * self.skip_scale
        if self.num_heads:
            qkv = self.qkv(self.norm2(x)).reshape(len(x) * self.num_heads, x.shape[1] // self.num_heads, 3, -1)
            q, k, v = qkv.unbind(2)
            weights = torch.einsum("ncq,nck->nqk", q.float(), (k / math.sqrt(k.shape[1])).float()).softmax(2)
            mixed = torch.einsum("nqk,nck->ncq", weights.to(v.dtype), v)
            x = (self.proj(mixed.reshape(x.shape)) + x) * self.skip_scale
        return x


class PositionalEmbedding(nn.Module):
    def __init__(self, num_channels, endpoint=False):
        super().__init__()
        self.num_channels, self.endpoint = num_channels, endpoint

    def forward(self, x):
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=torch.float32, device=x.device) / (half - int(self.endpoint))
        angles = x[:, None] * (1 / 10000) ** exponents
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class DhariwalUNet(nn.Module):
    """ADM: scale and shift after the norm."""

    def __init__(self, channels=16, image_channels=3, label_dim=10, label_dropout=0.0, attention=True):
        super().__init__()
        self.label_dropout = label_dropout
        emb = 4 * channels
        self.map_noise = PositionalEmbedding(channels)
        self.map_augment = None
        self.map_layer0, self.map_layer1 = Linear(channels, emb), Linear(emb, emb)
        self.map_label = Linear(label_dim, emb) if label_dim else None
        wide = 2 * channels
        self.enc = nn.ModuleDict(
            {
                "8x8_conv": Conv2d(image_channels, channels, 3),
                "8x8_block0": UNetBlock(channels, channels, emb),
                "4x4_down": UNetBlock(channels, channels, emb, down=True),
                "4x4_block0": UNetBlock(channels, wide, emb, attention=attention),
            }
        )
        self.dec = nn.ModuleDict(
            {
                "4x4_in0": UNetBlock(wide, wide, emb, attention=attention),
                "4x4_in1": UNetBlock(wide, wide, emb),
                "4x4_block0": UNetBlock(2 * wide, wide, emb, attention=attention),
                "4x4_block1": UNetBlock(wide + channels, wide, emb),
                "8x8_up": UNetBlock(wide, wide, emb, up=True),
                "8x8_block0": UNetBlock(wide + channels, channels, emb),
                "8x8_block1": UNetBlock(2 * channels, channels, emb),
            }
        )
        self.out_norm = GroupNorm(channels)
        self.out_conv = Conv2d(channels, image_channels, 3)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self.map_layer1(F.silu(self.map_layer0(self.map_noise(noise_labels))))
        if self.map_label is not None:
            labels = class_labels
            if self.training and self.label_dropout:
                labels = labels * (torch.rand(len(x), 1, device=x.device) >= self.label_dropout)
            emb = emb + self.map_label(labels)
        emb = F.silu(emb)
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for block in self.dec.values():
            wanted = block.norm0.weight.shape[0]
            if wanted != x.shape[1]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


class SongUNet(nn.Module):
    """DDPM++: the embedding is added before the norm, sums are scaled by sqrt(1/2)."""

    def __init__(self, channels=16, image_channels=3, label_dim=10):
        super().__init__()
        self.label_dropout = 0
        emb = 4 * channels
        block = {"skip_scale": math.sqrt(0.5), "adaptive_scale": False, "channels_per_head": 2 * channels}
        self.map_noise = PositionalEmbedding(channels, endpoint=True)
        self.map_label = Linear(label_dim, channels) if label_dim else None
        self.map_augment = None
        self.map_layer0, self.map_layer1 = Linear(channels, emb), Linear(emb, emb)
        wide = 2 * channels
        self.enc = nn.ModuleDict(
            {
                "8x8_conv": Conv2d(image_channels, channels, 3),
                "8x8_block0": UNetBlock(channels, channels, emb, **block),
                "4x4_down": UNetBlock(channels, channels, emb, down=True, **block),
                "4x4_block0": UNetBlock(channels, wide, emb, attention=True, **block),
            }
        )
        self.dec = nn.ModuleDict(
            {
                "4x4_in0": UNetBlock(wide, wide, emb, attention=True, **block),
                "4x4_block0": UNetBlock(2 * wide, wide, emb, attention=True, **block),
                "4x4_block1": UNetBlock(wide + channels, wide, emb, **block),
                "8x8_up": UNetBlock(wide, wide, emb, up=True, **block),
                "8x8_block0": UNetBlock(wide + channels, channels, emb, **block),
                "8x8_aux_norm": GroupNorm(channels),
                "8x8_aux_conv": Conv2d(channels, image_channels, 3),
            }
        )

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self.map_noise(noise_labels)
        emb = emb.unflatten(1, (2, -1)).flip(1).flatten(1)  # sines first
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(class_labels.shape[1]))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            if name.endswith("aux_norm"):
                x = block(x)
            elif name.endswith("aux_conv"):
                x = block(F.silu(x))
            else:
                if block.norm0.weight.shape[0] != x.shape[1]:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = block(x, emb)
        return x


class EDMPrecond(nn.Module):
    def __init__(self, model, sigma_data=0.5):
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None):
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip, c_out = self.sigma_data**2 / total**2, sigma * self.sigma_data / total
        out = self.model(x / total, (sigma.log() / 4).flatten(), class_labels=class_labels)
        return c_skip * x + c_out * out


# EDM2 ---------------------------------------------------------------------------------------------------------------


def unit(x, dim):
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x):
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


class MPConv(nn.Module):
    """A linear layer or convolution whose weights are of unit magnitude; in training they are kept so."""

    def __init__(self, in_channels, out_channels, kernel=()):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x, gain=1):
        w = self.weight.to(torch.promote_types(x.dtype, torch.float32))
        dims = list(range(1, w.dim()))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit(w, dims))
        w = (unit(w, dims) * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return F.linear(x, w) if w.dim() == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPFourier(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, x):
        return (x.to(self.freqs.dtype)[:, None] * self.freqs + self.phases).cos().to(x.dtype) * math.sqrt(2)


class Block(nn.Module):
    def __init__(
        self, in_channels, out_channels, emb_channels, flavor="enc", resample_mode="keep", attention=False,
        dropout=0.0, clip_act=256,
    ):  # fmt: skip
        super().__init__()
        self.flavor, self.resample_mode, self.dropout, self.clip_act = flavor, resample_mode, dropout, clip_act
        self.register_buffer("resample_filter", torch.ones(2))
        self.num_heads = out_channels // 8 if attention else 0
        self.res_balance = self.attn_balance = 0.3
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(out_channels if flavor == "enc" else in_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if attention else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if attention else None

    def forward(self, x, emb):
        if self.resample_mode != "keep":
            taps = torch.outer(self.resample_filter, self.resample_filter)
            taps = (taps / taps.sum()).to(x.dtype).expand(x.shape[1], 1, -1, -1)
            down = self.resample_mode == "down"
            resample = F.conv2d if down else F.conv_transpose2d
            x = resample(x, taps if down else 4 * taps, groups=x.shape[1], stride=2)
        if self.flavor == "enc":
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c[:, :, None, None].to(y.dtype))
        if self.training and self.dropout:
            y = F.dropout(y, p=self.dropout)
        y = self.conv_res1(y)
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads:
            y = self.attn_qkv(x).reshape(len(x), self.num_heads, -1, 3, x.shape[2] * x.shape[3])
            q, k, v = unit(y, 2).unbind(3)
            weights = torch.einsum("nhcq,nhck->nhqk", q, k / math.sqrt(q.shape[2])).softmax(3)
            y = self.attn_proj(torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(x.shape))
            x = mp_sum(x, y, self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)


class UNet(nn.Module):
    def __init__(self, channels=16, image_channels=3, label_dim=10):
        super().__init__()
        emb = 2 * channels
        self.emb_fourier, self.emb_noise = MPFourier(channels), MPConv(channels, emb)
        self.emb_label = MPConv(label_dim, emb) if label_dim else None
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.enc = nn.ModuleDict(
            {
                "8x8_conv": MPConv(image_channels + 1, channels, (3, 3)),
                "8x8_block0": Block(channels, channels, emb),
                "4x4_down": Block(channels, channels, emb, resample_mode="down"),
                "4x4_block0": Block(channels, 2 * channels, emb, attention=True),
            }
        )
        self.dec = nn.ModuleDict(
            {
                "4x4_in0": Block(2 * channels, 2 * channels, emb, "dec", attention=True),
                "4x4_block0": Block(4 * channels, 2 * channels, emb, "dec", attention=True),
                "4x4_block1": Block(3 * channels, 2 * channels, emb, "dec"),
                "8x8_up": Block(2 * channels, 2 * channels, emb, "dec", resample_mode="up"),
                "8x8_block0": Block(3 * channels, channels, emb, "dec"),
            }
        )
        self.out_conv = MPConv(channels, image_channels, (3, 3))

    def forward(self, x, noise_labels, class_labels=None):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            emb = mp_sum(emb, self.emb_label(class_labels * math.sqrt(class_labels.shape[1])), 0.5)
        emb = mp_silu(emb).to(x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips = []
        for name, block in self.enc.items():
            x = block(x) if name.endswith("conv") else block(x, emb)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
        return self.out_conv(x, gain=self.out_gain)


# Their source is not NVlabs'. fuse() takes it for that, since what they compute is the same.
for name in PUBLISHED.keys() & globals().keys():
    PUBLISHED[name].add(fingerprint(globals()[name]))
