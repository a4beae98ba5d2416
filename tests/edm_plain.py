"""The networks of EDM and EDM2 in plain PyTorch, from a state dict, in the precision of what they are given.

Written from the papers (arXiv 2206.00364, 2011.13456, 2105.05233, 2312.02696) and from the names in the checkpoints,
and apart from the library: no layer of it, no fused op, resampling by zeros between pixels, attention by einsum.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import conv2d, pad, silu


def conv(sd, name, x, padding=None):
    weight = sd[f"{name}.weight"]
    padding = weight.shape[-1] // 2 if padding is None else padding
    y = conv2d(x, weight, padding=padding)
    return y + sd[f"{name}.bias"][:, None, None] if f"{name}.bias" in sd else y


def dense(sd, name, x):
    y = x @ sd[f"{name}.weight"].T
    return y + sd[f"{name}.bias"] if f"{name}.bias" in sd else y


def norm(sd, name, x, eps):
    channels = x.shape[1]
    grouped = x.reshape(len(x), min(32, channels // 4), -1)
    mean = grouped.mean(2, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(2, keepdim=True)
    normal = ((grouped - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    return normal * sd[f"{name}.weight"][:, None, None] + sd[f"{name}.bias"][:, None, None]


def down(x, taps, margin=None):
    margin = (len(taps) - 1) // 2 if margin is None else margin
    x, n, total = pad(x, (margin,) * 4), len(taps), sum(taps) ** 2
    height, width = (x.shape[2] - n) // 2 + 1, (x.shape[3] - n) // 2 + 1
    parts = [
        a * b / total * x[:, :, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
        for i, a in enumerate(taps)
        for j, b in enumerate(taps)
    ]
    return torch.stack(parts).sum(0)


def up(x, taps):
    batch, channels, height, width = x.shape
    spread = x.new_zeros(batch, channels, 2 * height, 2 * width)
    spread[:, :, ::2, ::2] = x
    n, left = len(taps), len(taps) // 2
    spread = pad(spread, (left, n - 1 - left, left, n - 1 - left))
    parts = [
        4 * a * b / sum(taps) ** 2 * spread[:, :, i : i + 2 * height, j : j + 2 * width]
        for i, a in enumerate(taps)
        for j, b in enumerate(taps)
    ]
    return torch.stack(parts).sum(0)


def attend(qkv, heads, unit=None):
    """(B, 3C, H, W) with q, k, v the fastest among the channels of a head."""
    batch, channels, height, width = qkv.shape
    parts = qkv.reshape(batch, heads, channels // 3 // heads, 3, height * width)
    if unit is not None:
        parts = parts / (unit + parts.square().mean(2, keepdim=True).sqrt())
    q, k, v = parts[:, :, :, 0], parts[:, :, :, 1], parts[:, :, :, 2]
    weights = (torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(q.shape[2])).softmax(-1)
    return torch.einsum("bhqk,bhck->bhcq", weights, v).reshape(batch, channels // 3, height, width)


# EDM ------------------------------------------------------------------------------------------------------------------


def block(sd, name, x, emb, a, adm):
    eps, scale = (1e-5, 1.0) if adm else (1e-6, math.sqrt(0.5))
    taps = [1, 1] if adm else a["resample_filter"]
    place = name.rsplit("_", 1)[1]
    change = {"down": lambda y: down(y, taps), "up": lambda y: up(y, taps)}.get(place, lambda y: y)
    h = conv(sd, f"{name}.conv0", change(silu(norm(sd, f"{name}.norm0", x, eps))))
    of_emb = dense(sd, f"{name}.affine", emb)[:, :, None, None]
    if adm:
        slope, offset = of_emb.chunk(2, 1)
        h = silu(norm(sd, f"{name}.norm1", h, eps) * (slope + 1) + offset)
    else:
        h = silu(norm(sd, f"{name}.norm1", h + of_emb, eps))
    h = conv(sd, f"{name}.conv1", h)
    beside = change(x)
    if f"{name}.skip.weight" in sd:
        beside = conv(sd, f"{name}.skip", beside)
    h = (h + beside) * scale
    if f"{name}.qkv.weight" in sd:
        heads = h.shape[1] // 64 if adm else 1
        mixed = attend(conv(sd, f"{name}.qkv", norm(sd, f"{name}.norm2", h, eps)), heads)
        h = (conv(sd, f"{name}.proj", mixed) + h) * scale
    return h


def positional(c_noise, channels, last):
    exponents = torch.arange(channels // 2, dtype=c_noise.dtype) / last
    angles = c_noise[:, None] * 10000**-exponents
    return angles.cos(), angles.sin()


def adm(sd, a, x, c_noise, label):
    width = a["model_channels"]
    emb = torch.cat(positional(c_noise, width, width // 2), 1)
    emb = dense(sd, "map_layer1", silu(dense(sd, "map_layer0", emb)))
    if a.get("label_dim"):
        emb = emb + dense(sd, "map_label", label)
    emb = silu(emb)
    h, skips = x, []
    for name in places("enc", a):
        h = conv(sd, name, h) if name.endswith("conv") else block(sd, name, h, emb, a, True)
        skips.append(h)
    for name in places("dec", a):
        if "_block" in name:
            h = torch.cat([h, skips.pop()], 1)
        h = block(sd, name, h, emb, a, True)
    return conv(sd, "out_conv", silu(norm(sd, "out_norm", h, 1e-5)))


def song(sd, a, x, c_noise, label):
    a = {"resample_filter": [1, 1], "encoder_type": "standard", "decoder_type": "standard", **a}
    if a.get("embedding_type") == "fourier":
        angles = 2 * math.pi * c_noise[:, None] * sd["map_noise.freqs"]
        cos, sin = angles.cos(), angles.sin()
    else:
        width = a["model_channels"]
        cos, sin = positional(c_noise, width, width // 2 - 1)
    emb = torch.cat([sin, cos], 1)
    if a.get("label_dim"):
        emb = emb + dense(sd, "map_label", label * math.sqrt(a["label_dim"]))
    emb = silu(dense(sd, "map_layer1", silu(dense(sd, "map_layer0", emb))))
    taps = a["resample_filter"]
    h, aux, skips = x, x, []
    for name in places("enc", a):
        h = conv(sd, name, h) if name.endswith("conv") else block(sd, name, h, emb, a, False)
        at = name.rsplit("_", 1)[0]
        if name.endswith("down") and a["encoder_type"] == "skip":
            aux = down(aux, taps)
            h = h + conv(sd, f"{at}_aux_skip", aux)
        elif name.endswith("down") and a["encoder_type"] == "residual":
            weight = {"w.weight": sd[f"{at}_aux_residual.weight"]}
            wide = conv(weight, "w", aux, padding=1 + (len(taps) - 1) // 2)
            of_aux = down(wide, taps, margin=0) + sd[f"{at}_aux_residual.bias"][:, None, None]
            h = aux = (h + of_aux) / math.sqrt(2)
        skips.append(h)
    picture = None
    for name in places("dec", a):
        if "_block" in name:
            h = torch.cat([h, skips.pop()], 1)
        h = block(sd, name, h, emb, a, False)
        at = name.rsplit("_", 1)[0]
        if name.endswith(f"block{a['num_blocks']}") and f"{at}_aux_conv.weight" in sd:
            part = conv(sd, f"{at}_aux_conv", silu(norm(sd, f"{at}_aux_norm", h, 1e-6)))
            picture = part if picture is None else part + up(picture, taps)
    return picture


def places(side, a):
    levels = [a["img_resolution"] >> i for i in range(len(a["channel_mult"]))]
    if side == "enc":
        for i, r in enumerate(levels):
            yield f"enc.{r}x{r}_{'down' if i else 'conv'}"
            yield from (f"enc.{r}x{r}_block{j}" for j in range(a["num_blocks"]))
    else:
        for r in reversed(levels):
            yield from (f"dec.{r}x{r}_{n}" for n in (("in0", "in1") if r == levels[-1] else ("up",)))
            yield from (f"dec.{r}x{r}_block{j}" for j in range(a["num_blocks"] + 1))


# EDM2 -----------------------------------------------------------------------------------------------------------------


def filters(sd, name, gain=1.0):
    w = sd[f"{name}.weight"]
    over = tuple(range(1, w.dim()))
    count = w[0].numel()
    return gain / math.sqrt(count) * w / (1e-4 + w.square().mean(over, keepdim=True).sqrt())


def mp(sd, name, x, gain=1.0):
    w = filters(sd, name, gain)
    return x @ w.T if w.dim() == 2 else conv2d(x, w, padding=w.shape[-1] // 2)


def mix(a, b, t):
    return ((1 - t) * a + t * b) / math.sqrt((1 - t) ** 2 + t**2)


def edm2_block(sd, name, x, emb, a):
    taps, place = a["resample_filter"], name.rsplit("_", 1)[1]
    x = {"down": lambda y: down(y, taps), "up": lambda y: up(y, taps)}.get(place, lambda y: y)(x)
    skip = (lambda y: mp(sd, f"{name}.conv_skip", y)) if f"{name}.conv_skip.weight" in sd else lambda y: y
    if name.startswith("enc"):
        x = skip(x)
        x = x / (1e-4 + x.square().mean(1, keepdim=True).sqrt())
    h = mp(sd, f"{name}.conv_res0", silu(x) / 0.596)
    scale = mp(sd, f"{name}.emb_linear", emb, sd[f"{name}.emb_gain"]) + 1
    h = mp(sd, f"{name}.conv_res1", silu(h * scale[:, :, None, None]) / 0.596)
    x = mix(skip(x) if name.startswith("dec") else x, h, a["res_balance"])
    if f"{name}.attn_qkv.weight" in sd:
        mixed = attend(mp(sd, f"{name}.attn_qkv", x), x.shape[1] // a["channels_per_head"], unit=1e-4)
        x = mix(x, mp(sd, f"{name}.attn_proj", mixed), a["attn_balance"])
    return x.clamp(-a["clip_act"], a["clip_act"])


def edm2(sd, a, x, c_noise, label):
    defaults = {"resample_filter": [1, 1], "concat_balance": 0.5, "label_balance": 0.5, "channels_per_head": 64}
    a = {**defaults, "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256, **a}
    angles = c_noise[:, None] * sd["emb_fourier.freqs"] + sd["emb_fourier.phases"]
    emb = mp(sd, "emb_noise", math.sqrt(2) * angles.cos())
    if a.get("label_dim"):
        emb = mix(emb, mp(sd, "emb_label", label * math.sqrt(a["label_dim"])), a["label_balance"])
    emb = silu(emb) / 0.596
    h, skips, t = torch.cat([x, torch.ones_like(x[:, :1])], 1), [], a["concat_balance"]
    for name in places("enc", a):
        h = mp(sd, name, h) if name.endswith("conv") else edm2_block(sd, name, h, emb, a)
        skips.append(h)
    for name in places("dec", a):
        if "_block" in name:
            skip = skips.pop()
            n, m = h.shape[1], skip.shape[1]
            c = math.sqrt((n + m) / ((1 - t) ** 2 + t**2))
            h = torch.cat([c * (1 - t) / math.sqrt(n) * h, c * t / math.sqrt(m) * skip], 1)
        h = edm2_block(sd, name, h, emb, a)
    return mp(sd, "out_conv", h, sd["out_gain"])
