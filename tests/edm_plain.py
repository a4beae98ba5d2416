"""The networks of EDM and EDM2 in plain PyTorch: the float64 reference, and lookalikes for fuse().

Written from the papers (arXiv 2206.00364, 2011.13456, 2105.05233, 2312.02696) and from the names in the checkpoints,
apart from the library. Attributes are named as NVlabs' are. Every layer computes in the precision of what it is given.
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from emd_fast.fusion.published import PUBLISHED, fingerprint


def resampled(x, taps, up=False, down=False, margin=None):
    """Zeros between the pixels (up) or every second pixel (down), smoothed by the separable filter of these taps."""
    row = torch.as_tensor(taps, dtype=x.dtype)
    kernel = (torch.outer(row, row) / row.sum() ** 2).expand(x.shape[1], 1, -1, -1)
    margin = (len(row) - 1) // 2 if margin is None else margin
    if up:
        return F.conv_transpose2d(x, 4 * kernel, groups=x.shape[1], stride=2, padding=margin)
    return F.conv2d(x, kernel, groups=x.shape[1], stride=2, padding=margin) if down else x


def attend(qkv, heads):
    """(B, 3C, H, W), q, k and v the fastest among the channels of a head, to (B, C, H, W)."""
    q, k, v = qkv.reshape(len(qkv), heads, -1, 3, qkv.shape[2] * qkv.shape[3]).unbind(3)
    weights = torch.einsum("bhcq,bhck->bhqk", q, k / math.sqrt(q.shape[2])).softmax(3)
    return torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(len(qkv), -1, *qkv.shape[2:])


def build(network, block, first, a, attend_every=True):
    """Encoder and decoder; block(cin, cout, decoder=, attention=, up=, down=)."""
    network.enc, network.dec = nn.ModuleDict(), nn.ModuleDict()
    levels = [(a["img_resolution"] >> i, a["model_channels"] * mult) for i, mult in enumerate(a["channel_mult"])]
    network.enc[f"{levels[0][0]}x{levels[0][0]}_conv"] = first
    skips, channels = [levels[0][1]], levels[0][1]
    for r, wide in levels:
        if r != levels[0][0]:
            network.enc[f"{r}x{r}_down"] = block(channels, channels, down=True)
            skips.append(channels)
        for i in range(a["num_blocks"]):
            network.enc[f"{r}x{r}_block{i}"] = block(channels, wide, attention=r in a["attn_resolutions"])
            channels = wide
            skips.append(channels)
    for r, wide in reversed(levels):
        if r == levels[-1][0]:
            network.dec[f"{r}x{r}_in0"] = block(channels, channels, decoder=True, attention=True)
            network.dec[f"{r}x{r}_in1"] = block(channels, channels, decoder=True)
        else:
            network.dec[f"{r}x{r}_up"] = block(channels, channels, decoder=True, up=True)
        for i in range(a["num_blocks"] + 1):
            attention = r in a["attn_resolutions"] and (attend_every or i == a["num_blocks"])
            network.dec[f"{r}x{r}_block{i}"] = block(channels + skips.pop(), wide, decoder=True, attention=attention)
            channels = wide


def through(network, x, emb, join):
    skips = []
    for name, block in network.enc.items():
        x = block(x) if name.endswith("conv") else block(x, emb)
        skips.append(x)
    for name, block in network.dec.items():
        x = block(join(x, skips.pop()) if "block" in name else x, emb)
    return x


class Linear(nn.Module):
    def __init__(self, in_features, out_features, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x):
        y = x @ self.weight.to(x.dtype).T
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Conv2d(nn.Module):
    """A convolution after resampling, or before it (`last`); the resampling alone where kernel is 0."""

    def __init__(self, in_channels, out_channels, kernel, up=False, down=False, taps=(1, 1), last=False):
        super().__init__()
        self.up, self.down, self.kernel, self.taps, self.last = up, down, kernel, taps, last
        shape = (out_channels, in_channels, kernel, kernel)
        self.weight = nn.Parameter(torch.randn(shape)) if kernel else None
        self.bias = nn.Parameter(torch.zeros(out_channels)) if kernel else None

    def forward(self, x):
        margin = (len(self.taps) - 1) // 2
        x = x if self.last else resampled(x, self.taps, self.up, self.down)
        if self.weight is None:
            return x
        x = F.conv2d(x, self.weight.to(x.dtype), padding=self.kernel // 2 + (margin if self.last else 0))
        x = resampled(x, self.taps, down=True, margin=0) if self.last else x
        return x + self.bias.to(x.dtype)[:, None, None]


class GroupNorm(nn.Module):
    def __init__(self, num_channels, eps=1e-5):
        super().__init__()
        self.num_groups, self.eps = min(32, num_channels // 4), eps
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class UNetBlock(nn.Module):
    def __init__(
        self, in_channels, out_channels, emb_channels, up=False, down=False, attention=False, decoder=False, heads=1,
        taps=(1, 1), skip_scale=1.0, eps=1e-5, adaptive_scale=True, project=False,
    ):  # fmt: skip
        super().__init__()
        self.num_heads, self.dropout = heads if attention else 0, 0.0
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        self.norm0, self.norm1 = GroupNorm(in_channels, eps), GroupNorm(out_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, up, down, taps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1))
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = int(project or in_channels != out_channels)
            self.skip = Conv2d(in_channels, out_channels, kernel, up, down, taps)
        if self.num_heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv, self.proj = Conv2d(out_channels, 3 * out_channels, 1), Conv2d(out_channels, out_channels, 1)

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
            x = (self.proj(attend(self.qkv(self.norm2(x)), self.num_heads)) + x) * self.skip_scale
        return x


class PositionalEmbedding(nn.Module):
    def __init__(self, num_channels, endpoint=False):
        super().__init__()
        self.num_channels, self.endpoint = num_channels, endpoint

    def forward(self, x):
        half = self.num_channels // 2
        exponents = torch.arange(half, dtype=x.dtype, device=x.device) / (half - int(self.endpoint))
        angles = x[:, None] * 10000**-exponents
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    def __init__(self, num_channels):
        super().__init__()
        self.register_buffer("freqs", 16 * torch.randn(num_channels // 2))

    def forward(self, x):
        angles = 2 * math.pi * x[:, None] * self.freqs.to(x.dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class DhariwalUNet(nn.Module):
    """ADM: scale and shift after the norm."""

    def __init__(self, label_dropout=0.0, channels_per_head=64, **a):
        super().__init__()
        channels, self.label_dropout = a["model_channels"], label_dropout
        emb = 4 * channels
        self.map_noise, self.map_augment = PositionalEmbedding(channels), None
        self.map_layer0, self.map_layer1 = Linear(channels, emb), Linear(emb, emb)
        self.map_label = Linear(a["label_dim"], emb, bias=False) if a.get("label_dim") else None

        def block(cin, cout, **options):
            return UNetBlock(cin, cout, emb, heads=cout // channels_per_head, **options)

        build(self, block, Conv2d(a["in_channels"], channels, 3), a)
        self.out_norm, self.out_conv = GroupNorm(channels), Conv2d(channels, a["out_channels"], 3)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self.map_layer1(F.silu(self.map_layer0(self.map_noise(noise_labels))))
        if self.map_label is not None:
            dropped = self.training and self.label_dropout
            kept = torch.rand(len(x), 1, device=x.device) >= self.label_dropout if dropped else 1
            emb = emb + self.map_label(class_labels * kept)
        x = through(self, x, F.silu(emb), lambda x, skip: torch.cat([x, skip], dim=1))
        return self.out_conv(F.silu(self.out_norm(x)))


class SongUNet(nn.Module):
    """DDPM++ and NCSN++: the embedding is added before the norm, sums are scaled by sqrt(1/2)."""

    def __init__(self, resample_filter=(1, 1), encoder_type="standard", decoder_type="standard", **a):
        super().__init__()
        self.num_blocks, self.taps, self.label_dropout = a["num_blocks"], resample_filter, 0
        self.encoder_type, channels = encoder_type, a["model_channels"]
        noise, emb = channels * a.get("channel_mult_noise", 1), 4 * channels
        fourier = a.get("embedding_type") == "fourier"
        self.map_noise = FourierEmbedding(noise) if fourier else PositionalEmbedding(noise, endpoint=True)
        self.map_label = Linear(a["label_dim"], noise) if a.get("label_dim") else None
        self.map_augment = None
        self.map_layer0, self.map_layer1 = Linear(noise, emb), Linear(emb, emb)
        style = {"skip_scale": math.sqrt(0.5), "eps": 1e-6, "adaptive_scale": False, "project": True}
        block = partial(UNetBlock, taps=resample_filter, **style)
        first = Conv2d(a["in_channels"], channels, 3)
        build(self, lambda cin, cout, **options: block(cin, cout, emb, **options), first, a, attend_every=False)
        aux = a["in_channels"]
        levels = [(a["img_resolution"] >> i, channels * m) for i, m in enumerate(a["channel_mult"])]
        for (r, _), (_, wide) in zip(levels[1:], levels, strict=False):
            if encoder_type == "skip":
                self.enc[f"{r}x{r}_aux_skip"] = Conv2d(aux, wide, 1)
            elif encoder_type == "residual":
                self.enc[f"{r}x{r}_aux_residual"] = Conv2d(aux, wide, 3, down=True, taps=resample_filter, last=True)
                aux = wide
        for r, wide in levels if decoder_type == "skip" else levels[:1]:
            self.dec[f"{r}x{r}_aux_norm"] = GroupNorm(wide, 1e-6)
            self.dec[f"{r}x{r}_aux_conv"] = Conv2d(wide, a["out_channels"], 3)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        emb = self.map_noise(noise_labels).unflatten(1, (2, -1)).flip(1).flatten(1)  # sines first
        if self.map_label is not None:
            emb = emb + self.map_label(class_labels * math.sqrt(class_labels.shape[1]))
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))
        aux, skips, picture = x, [], None
        for name, block in self.enc.items():
            if "aux" in name:
                continue
            x = block(x) if name.endswith("conv") else block(x, emb)
            at = name.rsplit("_", 1)[0]
            if name.endswith("down") and self.encoder_type == "skip":
                aux = resampled(aux, self.taps, down=True)
                x = x + self.enc[f"{at}_aux_skip"](aux)
            elif name.endswith("down") and self.encoder_type == "residual":
                x = aux = (x + self.enc[f"{at}_aux_residual"](aux)) / math.sqrt(2)
            skips.append(x)
        for name, block in self.dec.items():
            if "aux" in name:
                continue
            x = block(torch.cat([x, skips.pop()], dim=1) if "block" in name else x, emb)
            at = name.rsplit("_", 1)[0]
            if name.endswith(f"block{self.num_blocks}") and f"{at}_aux_conv" in self.dec:
                part = self.dec[f"{at}_aux_conv"](F.silu(self.dec[f"{at}_aux_norm"](x)))
                picture = part if picture is None else part + resampled(picture, self.taps, up=True)
        return picture


class EDMPrecond(nn.Module):
    def __init__(self, model, sigma_data=0.5):
        super().__init__()
        self.model, self.sigma_data = model, sigma_data

    def forward(self, x, sigma, class_labels=None):
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = (sigma**2 + self.sigma_data**2).sqrt()
        c_skip, c_out = self.sigma_data**2 / total**2, sigma * self.sigma_data / total
        return c_skip * x + c_out * self.model(x / total, (sigma.log() / 4).flatten(), class_labels=class_labels)


def unit(x, dim):
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mp_silu(x):
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t):
    n, m = a.shape[1], b.shape[1]
    scale = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
    return torch.cat([scale * (1 - t) / math.sqrt(n) * a, scale * t / math.sqrt(m) * b], dim=1)


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
        self, in_channels, out_channels, emb_channels, decoder=False, attention=False, up=False, down=False,
        channels_per_head=64, resample_filter=(1, 1), res_balance=0.3, attn_balance=0.3, clip_act=256, dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        self.flavor, self.resample_mode = "dec" if decoder else "enc", "up" if up else "down" if down else "keep"
        self.resample_filter, self.dropout, self.clip_act = resample_filter, dropout, clip_act
        self.num_heads = out_channels // channels_per_head if attention else 0
        self.res_balance, self.attn_balance = res_balance, attn_balance
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(in_channels if decoder else out_channels, out_channels, (3, 3))
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, (3, 3))
        self.conv_skip = MPConv(in_channels, out_channels, (1, 1)) if in_channels != out_channels else None
        self.attn_qkv = MPConv(out_channels, 3 * out_channels, (1, 1)) if attention else None
        self.attn_proj = MPConv(out_channels, out_channels, (1, 1)) if attention else None

    def forward(self, x, emb):
        x = resampled(x, self.resample_filter, self.resample_mode == "up", self.resample_mode == "down")
        if self.flavor == "enc":
            x = unit(x if self.conv_skip is None else self.conv_skip(x), 1)
        y = self.conv_res0(mp_silu(x))
        c = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * c[:, :, None, None].to(y.dtype))
        y = self.conv_res1(F.dropout(y, p=self.dropout, training=self.training))
        if self.flavor == "dec" and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, self.res_balance)
        if self.num_heads:
            y = self.attn_qkv(x)
            y = unit(y.unflatten(1, (self.num_heads, -1, 3)), 2).flatten(1, 3)
            x = mp_sum(x, self.attn_proj(attend(y, self.num_heads)), self.attn_balance)
        return x if self.clip_act is None else x.clip(-self.clip_act, self.clip_act)


class UNet(nn.Module):
    """EDM2's."""

    def __init__(self, concat_balance=0.5, label_balance=0.5, **a):
        super().__init__()
        channels, wide = a["model_channels"], a["model_channels"] * max(a["channel_mult"])
        noise = channels * (a.get("channel_mult_noise") or a["channel_mult"][0])
        emb = channels * a["channel_mult_emb"] if a.get("channel_mult_emb") else wide
        self.concat_balance, self.label_balance = concat_balance, label_balance
        self.emb_fourier, self.emb_noise = MPFourier(noise), MPConv(noise, emb)
        self.emb_label = MPConv(a["label_dim"], emb) if a.get("label_dim") else None
        self.out_gain = nn.Parameter(torch.zeros([]))
        own = ("channels_per_head", "resample_filter", "res_balance", "attn_balance", "clip_act")
        block = partial(Block, **{name: a[name] for name in own if name in a})
        first = MPConv(a["in_channels"] + 1, channels, (3, 3))
        build(self, lambda cin, cout, **options: block(cin, cout, emb, **options), first, a)
        self.out_conv = MPConv(channels, a["out_channels"], (3, 3))

    def forward(self, x, noise_labels, class_labels=None):
        emb = self.emb_noise(self.emb_fourier(noise_labels))
        if self.emb_label is not None:
            labels = self.emb_label(class_labels * math.sqrt(class_labels.shape[1]))
            emb = mp_sum(emb, labels, self.label_balance)
        emb = mp_silu(emb).to(x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x = through(self, x, emb, lambda x, skip: mp_cat(x, skip, self.concat_balance))
        return self.out_conv(x, gain=self.out_gain)


# Their source is not NVlabs'. fuse() is to take it for that, since what they compute is the same.
for name in PUBLISHED.keys() & globals().keys():
    PUBLISHED[name].add(fingerprint(globals()[name]))
