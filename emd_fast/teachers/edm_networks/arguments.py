"""The arguments that the networks of EDM and EDM2 were built with, checked: a file may hold any."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from emd_fast.config import validate


@dataclass(frozen=True)
class UNetArguments:
    """What all three UNets take.

    Args:
        img_resolution: height and width of an image.
        in_channels: of the input; out_channels: of the output.
        label_dim: number of classes, 0 for none.
        model_channels: at full resolution, times channel_mult at each of the resolutions, every
            one half of the last.
        num_blocks: residual blocks at a resolution.
        attn_resolutions: where the blocks have attention.
    """

    img_resolution: int
    in_channels: int
    out_channels: int
    label_dim: int = 0
    model_channels: int = 192
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 3, 4])
    num_blocks: int = 3
    attn_resolutions: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        validate(self)
        # Upper ends far above any published network: a hostile file must not build one without
        # end.
        for name, low, high in (
            ("img_resolution", 1, 2**14),
            ("in_channels", 1, 2**12),
            ("out_channels", 1, 2**12),
            ("label_dim", 0, 2**20),
            ("model_channels", 4, 2**14),
            ("num_blocks", 1, 64),
        ):
            self._in(name, low, high)
        mult, coarsest = self.channel_mult, 2 ** max(len(self.channel_mult) - 1, 0)
        self._require(1 <= len(mult) <= 12 and all(1 <= m <= 64 for m in mult), "channel_mult", "1 to 12 of 1 to 64")
        self._require(self.img_resolution % coarsest == 0, "img_resolution", f"divisible by {coarsest}")
        self._require(len(self.attn_resolutions) <= 64, "attn_resolutions", "a short list")

    @property
    def channels(self) -> list[int]:
        """At each resolution, the finest first."""
        return [self.model_channels * mult for mult in self.channel_mult]

    @property
    def resolutions(self) -> list[int]:
        return [self.img_resolution >> level for level in range(len(self.channel_mult))]

    def _in(self, name: str, low: int, high: int) -> None:
        self._require(low <= getattr(self, name) <= high, name, f"in [{low}, {high}]")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}"[:300])

    def _require_taps(self) -> None:
        taps: Any = getattr(self, "resample_filter")  # noqa: B009, of two of the subclasses
        even = 2 <= len(taps) <= 16 and len(taps) % 2 == 0
        self._require(even and all(tap > 0 for tap in taps), "resample_filter", "2 to 16 positive taps, an even number")


@dataclass(frozen=True)
class DhariwalArguments(UNetArguments):
    """channel_mult_emb: width of the embedding in model_channels; augment_dim: of augmentation labels, which are 0."""

    augment_dim: int = 0
    channel_mult_emb: int = 4
    attn_resolutions: list[int] = field(default_factory=lambda: [32, 16, 8])

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in("augment_dim", 0, 2**12)
        self._in("channel_mult_emb", 1, 64)


@dataclass(frozen=True)
class SongArguments(UNetArguments):
    """As DhariwalArguments, and what tells DDPM++ (the defaults) from NCSN++."""

    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: list[int] = field(default_factory=lambda: [16])
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: int = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: list[float] = field(default_factory=lambda: [1.0, 1.0])

    def __post_init__(self) -> None:
        super().__post_init__()
        self._in("augment_dim", 0, 2**12)
        self._in("channel_mult_emb", 1, 64)
        self._in("channel_mult_noise", 1, 64)
        self._require_taps()


@dataclass(frozen=True)
class EDM2Arguments(UNetArguments):
    """What EDM2 takes besides.

    Args:
        channel_mult_noise, channel_mult_emb: widths of the embeddings in model_channels; None for
            those of the finest and of the widest resolution.
        label_balance, concat_balance, res_balance, attn_balance: share of the second of two terms.
        channels_per_head: of attention.
        clip_act: largest activation, None for no limit.
    """

    channel_mult_noise: int | None = None
    channel_mult_emb: int | None = None
    attn_resolutions: list[int] = field(default_factory=lambda: [16, 8])
    label_balance: float = 0.5
    concat_balance: float = 0.5
    resample_filter: list[float] = field(default_factory=lambda: [1.0, 1.0])
    channels_per_head: int = 64
    res_balance: float = 0.3
    attn_balance: float = 0.3
    clip_act: float | None = 256.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channel_mult_noise", "channel_mult_emb"):
            if getattr(self, name) is not None:
                self._in(name, 1, 64)
        self._in("channels_per_head", 1, 2**14)
        for name in ("label_balance", "concat_balance", "res_balance", "attn_balance"):
            self._require(0 <= getattr(self, name) <= 1, name, "in [0, 1]")
        self._require(self.clip_act is None or self.clip_act > 0, "clip_act", "positive")
        self._require_taps()
