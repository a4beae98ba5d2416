"""UNet for small images such as digits, with 83 thousand parameters by default."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pixel_shuffle, pixel_unshuffle, scaled_dot_product_attention, silu

from emd_fast import ops
from emd_fast.noise import Noise, NoiseStream
from emd_fast.teachers.labels import check_labels

_GROUPS = 4  # groups of every norm, with 4 or 8 channels each by default


class SmallUNet(nn.Module):
    """UNet with residual blocks at two resolutions and attention at the lower one.

    Noise level and class enter as a scale and a shift of each block. The last convolution of each
    residual branch and of the network starts at zero, so the initial output is 0.
    `initialise(network, seed)` sets weights that are equal on every machine. Before that call they
    are PyTorch's, from its global random generator.

    Args:
        in_channels: channels of the image and of the output.
        channels: channels at full resolution, a multiple of 4. Half resolution has twice as many.
        num_classes: number of classes; 0 for a network without labels.
        embedding: width of the embedding of noise level and class.
        null_label: num_classes, for one more label that stands for no class. Labels of None mean it.
        patch: side of the squares of pixels that are one position of the network. Patches of 2 let it
            be twice as wide at the same cost.
    """

    frequencies: Tensor

    def __init__(
        self,
        in_channels: int,
        channels: int = 16,
        num_classes: int = 10,
        embedding: int = 64,
        null_label: int | None = None,
        patch: int = 1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("num_classes", num_classes, 0),
            ("patch", patch, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if channels < _GROUPS or channels % _GROUPS:
            raise ValueError(f"channels must be a multiple of {_GROUPS}, got {channels}")
        if null_label not in (None, num_classes) or null_label == 0:
            raise ValueError(f"null_label must be num_classes or None, got {null_label} of {num_classes} classes")
        self.null_label = null_label
        self.num_classes = num_classes if null_label is None else num_classes + 1
        # c_noise = log(sigma) / 4 has a range of 2.7 for sigma in [0.002, 80]. The frequencies give
        # from a fraction of a period to 8 periods over it.
        self.register_buffer("frequencies", torch.logspace(0, math.log10(20), channels), persistent=False)
        self.noise_embedding = nn.Linear(2 * channels, embedding)
        self.class_embedding = nn.Embedding(self.num_classes, embedding) if num_classes else None
        self.embedding = nn.Linear(embedding, embedding)
        self.rung_embedding: nn.Embedding | None = None

        self.patch = patch
        self.first = nn.Conv2d(in_channels * patch**2, channels, 3, padding=1)
        self.down_block = ResidualBlock(channels, channels)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.middle_block = ResidualBlock(2 * channels, 2 * channels)
        self.attention = SelfAttention(2 * channels)
        self.second_block = ResidualBlock(2 * channels, 2 * channels)
        self.up = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.up_block = ResidualBlock(2 * channels, channels)
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.last = _starts_at_zero(nn.Conv2d(channels, in_channels * patch**2, 3, padding=1))

        blocks = (self.down_block, self.middle_block, self.second_block, self.up_block)
        # One matrix product gives the scale and shift of all blocks. At this size the number of ops
        # determines the time.
        self._modulated = [2 * block.channels for block in blocks]
        self.modulation = nn.Linear(embedding, sum(self._modulated))

    def take_rungs(self, rungs: int) -> None:
        """Adds the rung, of `rungs`, to the inputs (`Denoiser.take_rungs`). The first outputs do not depend on it."""
        weight = self.embedding.weight
        self.rung_embedding = nn.Embedding(rungs, len(weight), device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.rung_embedding.weight)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None, rung: Tensor | None = None) -> Tensor:
        """Returns the output (B, C, H, W), in the dtype of the parameters.

        Args:
            x: (B, C, H, W) in the dtype of the parameters, H and W multiples of `patch`.
            c_noise: (B,), log(sigma) / 4 for EDM.
            labels: (B,) int64 in [0, num_classes], num_classes only where it is the null label; None
                for a network without labels, or for the null label.
            rung: (B,) int64, of a network that takes rungs.

        Raises:
            ValueError: labels that are missing, not expected, of a wrong shape or (CPU tensors)
                out of range; H or W not a multiple of `patch`.
            TypeError: labels that are not int64.
        """
        if x.shape[2] % self.patch or x.shape[3] % self.patch:
            raise ValueError(f"x must have a height and width of whole patches of {self.patch}, got {tuple(x.shape)}")
        modulation = self.modulation(self._embed(c_noise, labels, rung)).split(self._modulated, dim=1)
        positions = x if self.patch == 1 else pixel_unshuffle(x, self.patch)
        # Convolutions and norms of this size are faster in channels_last.
        full = self.first(positions).contiguous(memory_format=torch.channels_last)
        full = self.down_block(full, modulation[0])
        half = self.middle_block(self.down(full), modulation[1])
        half = self.second_block(self.attention(half), modulation[2])
        raised = self.up(interpolate(half, size=full.shape[2:], mode="nearest"))
        full = self.up_block(torch.cat([raised, full], dim=1), modulation[3])
        out: Tensor = self.last(silu(self.norm(full)))
        return out if self.patch == 1 else pixel_shuffle(out, self.patch)

    def _embed(self, c_noise: Tensor, labels: Tensor | None, rung: Tensor | None) -> Tensor:
        angles = c_noise.float()[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1)
        embedded = self.noise_embedding(waves.to(self.noise_embedding.weight.dtype))
        if labels is None and self.null_label is not None:
            labels = torch.full((len(c_noise),), self.null_label, device=c_noise.device)
        if (labels is None) != (self.class_embedding is None):
            raise ValueError(
                "this network has no classes: labels must be None"
                if self.class_embedding is None
                else f"labels must be given: int64 (B,) in [0, {self.num_classes})"
            )
        if labels is not None and self.class_embedding is not None:
            check_labels(labels, len(c_noise), self.num_classes)
            embedded = embedded + self.class_embedding(labels)
        if rung is not None and self.rung_embedding is not None:
            embedded = embedded + self.rung_embedding(rung)
        return silu(self.embedding(silu(embedded)))


class ResidualBlock(nn.Module):
    """Residual block: x + conv(silu(scale and shift(norm(conv(silu(norm(x))))))).

    A 1x1 convolution adapts x if the numbers of channels differ.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.norm1 = nn.GroupNorm(_GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(_GROUPS, channels)
        self.conv2 = _starts_at_zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.skip = nn.Identity() if in_channels == channels else nn.Conv2d(in_channels, channels, 1)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Returns (B, channels, H, W) for x (B, in_channels, H, W).

        `modulation` (B, 2 channels) has the scale and the shift.
        """
        scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(silu(self.norm1(x)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.skip(x) + self.conv2(silu(h))


class SelfAttention(nn.Module):
    """Self-attention over all pixels with one head: x + projection(softmax(q k^T / sqrt(c)) v)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.projection = _starts_at_zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Returns (B, channels, H, W) for x (B, channels, H, W)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens)[:, None].chunk(3, dim=-1)
        mixed = scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.projection(mixed).transpose(1, 2).reshape(x.shape)


def _starts_at_zero(layer: nn.Module) -> nn.Module:
    layer.starts_at_zero = True  # type: ignore[assignment]
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


@torch.no_grad()
def initialise(module: nn.Module, seed: int) -> None:
    """Fills every parameter in place from noise stream 13, with equal weights on every machine.

    Weights of convolutions and linear layers are normal with variance 1 / fan-in. Embeddings are
    standard normal, biases are 0, and norms are the identity. Layers with the mark
    `starts_at_zero` are 0. The substep of the noise is the index of the parameter in
    `module.parameters()`, and its first dimension is the sample.

    Args:
        module: a module with parameters in nn.Conv2d, nn.Linear, nn.Embedding and nn.GroupNorm
            only.
        seed: 0 <= seed < 2^63.

    Raises:
        TypeError: a layer of another class has parameters.
    """
    index = {parameter: substep for substep, parameter in enumerate(module.parameters())}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if getattr(layer, "starts_at_zero", False) or name == "bias":
                parameter.zero_()
            elif isinstance(layer, nn.GroupNorm):
                parameter.fill_(1)
            elif isinstance(layer, (nn.Conv2d, nn.Linear, nn.Embedding)):
                fan_in = 1 if isinstance(layer, nn.Embedding) else parameter[0].numel()
                noise = Noise(seed, device=parameter.device)
                drawn = ops.normal(parameter.shape, noise, stream=NoiseStream.WEIGHTS, substep=index[parameter])
                parameter.copy_(drawn / math.sqrt(fan_in))
            else:
                raise TypeError(f"initialise knows no rule for the parameter {name!r} of {type(layer).__name__}")
