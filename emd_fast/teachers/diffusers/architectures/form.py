"""The form of an architecture: what the library must know of one class of networks in diffusers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.config import ConfigError
from emd_fast.diffusion.denoiser import Condition
from emd_fast.io.reading import shown
from emd_fast.teachers.diffusers.architectures.conditions import GUIDANCE, ConditionSpec
from emd_fast.teachers.diffusers.shift import linear_mu

Config = Mapping[str, Any]
VAES = ("AutoencoderKL", "AutoencoderTiny", "AsymmetricAutoencoderKL")
CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer", "CLIPTokenizerFast")
GEMMA = ("Gemma2Model", "GemmaTokenizer", "GemmaTokenizerFast")
CLIP_TOKENS = 77
T5 = ("T5EncoderModel", "T5Tokenizer", "T5TokenizerFast")


class Architecture:
    """One network's class and configuration. A subclass has the name of the class in diffusers.

    Attributes:
        component: name of the network in a pipeline.
        pipelines: pipelines whose `encode_prompt` computes the conditions. The first one samples an
            exported generator.
        schedulers: schedulers with which that pipeline samples in one step.
        cuts_variance: that pipeline cuts a learned variance off.
        vaes, text: classes of its VAE, of its text encoders and tokenizers.
        null_label: the label that means "no label", or None.
        experts: its pipeline may have a second network, for the times below a boundary.
        patch: sides of a patch in latents, (frames, height, width). A sample has whole patches.
        size: latents (frames, height, width) of a sample where the configuration has no size, or None.
        video: a sample is (C, F, H, W), not (C, H, W).
        guidance: default of the embedded guidance, of a network that takes it.
        unguided: arguments with which the first pipeline does not guide and keeps the size.
        rescale: what the pipeline does to the guided output: (guided, conditional) -> F, or None.

    Args:
        config: the configuration of a network, with all its keys.

    Raises:
        ConfigError: the configuration has what is not supported.
    """

    component = "transformer"
    pipelines: tuple[str, ...] = ()
    schedulers: tuple[str, ...] = ("FlowMatchEulerDiscreteScheduler",)
    cuts_variance = False
    vaes: tuple[str, ...] = VAES
    text: tuple[str, ...] = ()
    patch: tuple[int, ...] = (1, 1, 1)
    size: tuple[int, int, int] | None = None
    video = False
    experts = False
    guidance = 0.0
    unguided: Mapping[str, Any] = {"guidance_scale": 1.0}
    rescale: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, config: Config) -> None:
        self.config = config
        self.takes = ConditionSpec()
        self.null_label: int | None = None

    def vae_channels(self, vae: Any) -> int:
        """Channels of the latents of a VAE with this configuration."""
        return int(vae.latent_channels)

    @property
    def channels(self) -> int:
        """Channels of a sample."""
        return int(self.config["in_channels"])

    @property
    def returned(self) -> int:
        """Channels of F: those of a sample, or twice as many with a learned variance."""
        return int(self.config.get("out_channels") or self.config["in_channels"])

    def heard(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The t that the network computes with for a t (B,) float32 where it computes in `dtype`."""
        return t

    def call(self, model: nn.Module, x: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Calls the stock network.

        Args:
            x: (B, C, H, W) or (B, C, F, H, W), as samples are.
            time: (B,) float32, a training index: (N - 1) t of a chain, N t of a rectified flow.
            cond: the tensors of `takes` by name.

        Returns:
            F (B, C, ...) in the parametrization of the scheduler, or (B, 2 C, ...) with a learned variance.
        """
        raise NotImplementedError

    def refuse(self, key: str, only: str) -> ConfigError:
        """The error for a value of the configuration that is not supported."""
        name, value = type(self).__name__, shown(self.config.get(key))
        return ConfigError(f"a {name} with {key} = {value} is not supported: {only}")

    # Samples ------------------------------------------------------------------------------------------------------

    def vae_scale(self, vae: Config) -> tuple[int, int]:
        """(frames - 1) / (latent frames - 1), and pixels of a side by latents of a side."""
        return 1, 2 ** (len(vae["block_out_channels"]) - 1) if vae else 8

    def pixels(self, shape: Sequence[int], vae: Config) -> tuple[int, int, int]:
        """Frames, height and width in pixels of a sample (C, H, W) or (C, F, H, W)."""
        every, side = self.vae_scale(vae)
        frames = shape[1] if self.video else 1
        return (frames - 1) * every + 1, shape[-2] * side, shape[-1] * side

    def sample_shape(
        self, vae: Config, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """Shape of a sample for a height and width in pixels and a number of frames.

        Args:
            vae: configuration of the VAE; empty without one.
            height, width, frames: None for those of the configuration.

        Raises:
            ConfigError: a size that VAE or patches do not divide, or no size at all.
        """
        every, side = self.vae_scale(vae)
        usual = self._usual_size((height, width, frames if self.video else 1))
        if frames is not None and not self.video:
            raise ConfigError(f"a {type(self).__name__} makes images: leave frames out")
        found = []
        for i, (name, pixels, scale) in enumerate(
            (("frames", frames, every), ("height", height, side), ("width", width, side))
        ):
            first = int(name == "frames")  # the first frame is a latent of its own
            unit = scale * self.patch[i]
            if pixels is None:
                found.append(usual[i])
                continue
            if pixels <= 0 or (pixels - first) % scale or ((pixels - first) // scale + first) % self.patch[i]:
                near = max(1, round((pixels - first) / unit)) * unit + first
                raise ConfigError(
                    f"{name} must be {'1 + ' if first else ''}a multiple of {unit} for this {type(self).__name__}, got "
                    f"{pixels}: give {near}"
                )
            found.append((pixels - first) // scale + first)
        return (self.channels, *found) if self.video else (self.channels, *found[1:])

    def check_channels(self) -> None:
        """Checks that the network takes samples and nothing beside them.

        Raises:
            ConfigError: other channels than it returns, as for inpainting and image to video.
        """
        if self.returned not in (self.channels, 2 * self.channels):
            raise ConfigError(
                f"this {type(self).__name__} has in_channels {self.channels} and out_channels {self.returned}: only as "
                "many, or twice as many (a learned variance) are supported, not inpainting or image to video"
            )

    def check_shape(self, shape: Sequence[int]) -> None:
        """Checks the shape of a sample, in latents.

        Raises:
            ConfigError: other channels or dimensions, or no whole patches.
        """
        name, channels = type(self).__name__, self.channels
        wanted = f"({channels}, {'F, ' if self.video else ''}H, W)"
        if len(shape) != 3 + self.video or shape[0] != channels:
            raise ConfigError(f"sample_shape must be {wanted} for this {name}, got {tuple(shape)}")
        for side, patch in zip(shape[1:], self.patch[-len(shape[1:]) :], strict=True):
            if side % patch:
                raise ConfigError(
                    f"sample_shape must be {wanted} for this {name} with sides in whole patches of {self.patch}, got "
                    f"{tuple(shape)}"
                )

    def tokens(self, shape: Sequence[int]) -> int:
        """Patches of a sample (C, H, W) or (C, F, H, W)."""
        sides = shape[1:]
        return math.prod(side // patch for side, patch in zip(sides, self.patch[-len(sides) :], strict=True))

    def mu(self, shape: Sequence[int], scheduler: Config) -> float:
        """The mu from which the pipeline computes a dynamic shift of times, for a sample of this shape."""
        return linear_mu(scheduler, self.tokens(shape))

    def _usual_size(self, given: tuple[int | None, ...]) -> tuple[int, int, int]:
        size = self.config.get("sample_size")
        if size is None and self.size is None and None in given:
            raise ConfigError(
                "the model's config.json has no sample_size: give --sample-shape C,H,W, or load(sample_shape=(C, H, W))"
            )
        if size is None:
            return self.size or (1, 1, 1)
        sides = (size, size) if isinstance(size, int) else size
        if (
            not isinstance(sides, (list, tuple))
            or len(sides) != 2
            or not all(type(side) is int and 0 < side <= 2**14 for side in sides)
        ):
            raise ConfigError(f"the model's configuration has sample_size = {shown(size)}, not (H, W)")
        return (self.size or (1, 1, 1))[0], *sides

    # Latents ------------------------------------------------------------------------------------------------------

    def to_vae(self, latents: Tensor, vae: Any) -> Tensor:
        """What the VAE decodes for samples (B, C, ...)."""
        scale = getattr(vae.config, "scaling_factor", None) or 1.0
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return latents / scale + shift

    def decode(self, latents: Tensor, vae: Any) -> Tensor:
        """Images (B, 3, H, W) or videos (B, 3, F, H, W) of samples."""
        image: Tensor = vae.decode(self.to_vae(latents, vae)).sample
        return image

    # Prompts ------------------------------------------------------------------------------------------------------

    def text_tokens(self) -> int:
        """Tokens that the pipeline makes of a prompt at most, with padding."""
        import diffusers

        taken = inspect.signature(getattr(diffusers, self.pipelines[0]).__call__).parameters
        tokens: int = taken["max_sequence_length"].default if "max_sequence_length" in taken else CLIP_TOKENS
        return tokens

    def condition(self, returned: tuple[Any, ...]) -> Condition:
        """The tensors of a condition that depend on the prompts, from what `encode_prompt` returns."""
        raise NotImplementedError

    def constants(self, shape: Sequence[int], vae: Config, guidance: float | None) -> dict[str, Any]:
        """Tensors of the condition that are equal for all prompts of a run: name -> its row.

        Args:
            shape: shape of a sample.
            vae: configuration of the VAE; empty without one.
            guidance: the embedded guidance; None for the default of the pipeline.
        """
        guided = GUIDANCE in self.takes.tensors
        given = {GUIDANCE: self.guidance if guidance is None else guidance} if guided else {}
        return {**self.of_size(shape, vae), **given}

    def of_size(self, shape: Sequence[int], vae: Config) -> dict[str, list[float]]:
        """Tensors of the condition that state the size of a sample (C, H, W) or (C, F, H, W): name -> its row.

        Args:
            vae: configuration of the VAE; empty without one.
        """
        return {}
