"""The generator that `emd_fast.export.load` returns; it needs neither trainer nor teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from emd_fast import ops
from emd_fast.diffusion import ragged
from emd_fast.diffusion.denoiser import Condition
from emd_fast.diffusion.few_step import check_calls
from emd_fast.noise import Noise, NoiseStream
from emd_fast.teachers.diffusers.architectures import Network
from emd_fast.teachers.diffusers.folder import Folder
from emd_fast.teachers.diffusers.sizes import resized


class Call(NamedTuple):
    """Coefficients of a call: x = c_skip u + c_out F(c_in u; c_noise), u = alpha before + scale z.

    `before` is x of the call before.
    """

    c_skip: float
    c_out: float
    c_in: float
    c_noise: float
    alpha: float
    scale: float


@dataclass(frozen=True)
class Metadata:
    """What is written beside the weights of an exported generator.

    Args:
        c_skip, c_out, c_in, c_noise, input_scale: coefficients of x = c_skip u + c_out F(c_in u;
            c_noise), u = input_scale z.
        sample_shape, latent_shape: shapes of one x and one z.
        precision: "float32" or "bfloat16", the autocast dtype that the trainer sampled in.
        dtype: dtype of the weights.
        seed, num_classes: `sample` draws with them as the trainer's `generate` did.
        steps: optimizer steps of the training.
        ema: whether the weights are the EMA.
        t_star: noise level in the teacher's t, for information only.
        rungs: a `Call` for each call of a generator of several; the numbers above are those of the first.
            Empty for one call.
        embedded_guidance: guidance that the network was given as an input; None for the default of its pipeline.
    """

    c_skip: float
    c_out: float
    c_in: float
    c_noise: float
    input_scale: float
    sample_shape: Sequence[int]
    latent_shape: Sequence[int]
    precision: Literal["float32", "bfloat16"]
    dtype: str
    seed: int
    num_classes: int
    steps: int
    ema: bool
    t_star: float | None
    rungs: Sequence[Sequence[float]] = ()
    embedded_guidance: float | None = None


class OneStep(nn.Module):
    """A generator from disk: `one_step(z, cond)` returns x.

    Args:
        network: F, called as network(x, c_noise, cond).
        metadata: what was written with the weights.
        whole: `network` is the generator itself, called as network(z, cond).
        folder: the pipeline folder with VAE and text encoders; None for a generator from a file.
    """

    def __init__(
        self, network: nn.Module, metadata: Metadata, *, whole: bool = False, folder: Folder | None = None
    ) -> None:
        super().__init__()
        self.network, self.metadata, self.folder, self._whole = network, metadata, folder, whole
        one = Call(metadata.c_skip, metadata.c_out, metadata.c_in, metadata.c_noise, 0.0, metadata.input_scale)
        self._calls = [Call(*call) for call in metadata.rungs] or [one]
        self.sample_shape, self.latent_shape = tuple(metadata.sample_shape), tuple(metadata.latent_shape)

    def forward(self, z: Tensor, cond: Condition = None) -> Tensor:
        """Returns x (B, ...) float32 of the first call, for z (B, ...) ~ N(0, I)."""
        return self.samples([z], cond)[0]

    def samples(self, noises: Sequence[Tensor], cond: Condition = None) -> list[Tensor]:
        """Returns x_1 .. x_m (B, ...) float32 of m calls, for z_1 .. z_m (B, ...) ~ N(0, I).

        Raises:
            ValueError: noises for more calls than the generator has.
        """
        check_calls(len(noises), len(self._calls))
        found: list[Tensor] = []
        precision = self.metadata.precision
        with torch.autocast(noises[0].device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            for call, z in zip(self._calls, noises, strict=False):
                if self._whole:
                    return [self.network(z, cond).float()]
                x = call.scale * z
                if found:
                    x = call.alpha * found[-1] + x
                found.append(self._denoised(x, call, cond))
        return found

    def _denoised(self, x: Tensor, call: Call, cond: Condition) -> Tensor:
        c_noise = torch.full((len(x),), call.c_noise, dtype=torch.float32, device=x.device)
        output = self.network((call.c_in * x).to(getattr(torch, self.metadata.dtype)), c_noise, cond)
        output = output[:, : x.shape[1]]
        if len(self._calls) > 1:
            output = output.float()  # as FewStepGenerator, whose coefficients are float32 tensors
        return (call.c_skip * x + call.c_out * output).float()

    @torch.no_grad()
    def sample(
        self,
        n: int,
        cond: Condition = None,
        *,
        seed: int | None = None,
        first_sample: int = 0,
        calls: int | None = None,
        shape: Sequence[int] | None = None,
    ) -> Tensor:
        """Returns n samples (n, ...) float32, those of the trainer's `generate` for the same seed.

        Args:
            n: number of samples.
            cond: batched conditions, on any device. When None, a generator with classes takes all
                classes in turn.
            seed: seed of z; the trainer's when None.
            first_sample: global index of the first sample in noise stream 9.
            calls: stop after that many calls; all when None.
            shape: of one sample, of a generator in a folder of diffusers; `sample_shape` when None.

        Raises:
            ValueError: more calls than the generator has; another shape for one that makes one.
        """
        latent = self.latent_shape
        if shape is not None and tuple(shape) != self.sample_shape:
            folder, network = self._of_diffusers()
            latent, cond = tuple(shape), network.sized(cond, shape, folder.vae_config())
        device = next(self.parameters()).device
        noise = Noise(self.metadata.seed if seed is None else seed, first_sample=first_sample, device=device)
        made = len(self._calls) if calls is None else check_calls(calls, len(self._calls))
        noises = [
            ops.normal((n, *latent), noise, stream=NoiseStream.SHOWN, substep=NoiseStream.shown_substep(j))
            for j in range(made)
        ]
        if cond is None and self.metadata.num_classes:
            cond = torch.arange(first_sample, first_sample + n, device=device) % self.metadata.num_classes
        cond = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), cond)
        return self.samples(noises, cond)[-1]

    def encode(self, prompts: Sequence[str], *, embedded_guidance: float | None = None) -> Condition:
        """Encodes prompts with the text encoders in the folder.

        Args:
            embedded_guidance: for networks that take it as an input; None for that of the training.

        Raises:
            ValueError: there is no text encoder.
        """
        if self.folder is None or not isinstance(self.network, Network):
            raise ValueError("this generator has no text encoder")
        guidance = self.metadata.embedded_guidance if embedded_guidance is None else embedded_guidance
        return ragged.trimmed(self.folder.text_encoder(self.network.model, self.sample_shape, guidance)(prompts))

    def resized(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        """The shape of a sample of a size in pixels; None keeps a side of `sample_shape`.

        Raises:
            ValueError: a generator that is in no folder of diffusers, or a size that VAE or patches do not divide.
        """
        folder, network = self._of_diffusers()
        size = {"height": height, "width": width, "frames": frames}
        return resized(network.architecture, folder.vae_config(), self.sample_shape, **size)

    def _of_diffusers(self) -> tuple[Folder, Network]:
        if self.folder is None or not isinstance(self.network, Network):
            raise ValueError(f"this generator makes samples of shape {self.sample_shape} alone: leave the size out")
        return self.folder, self.network

    def decode(self, samples: Tensor) -> Tensor:
        """Decodes latents with the folder's VAE; returns samples unchanged if there is none."""
        return samples if self.folder is None else self.folder.decode(samples)
