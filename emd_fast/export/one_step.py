"""The one-step generator that `emd_fast.export.load` returns; it needs neither trainer nor teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from emd_fast import ops
from emd_fast.diffusion import ragged
from emd_fast.diffusion.denoiser import Condition
from emd_fast.noise import Noise, NoiseStream
from emd_fast.teachers.diffusers.architectures import Network
from emd_fast.teachers.diffusers.folder import Folder


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
        self.sample_shape, self.latent_shape = tuple(metadata.sample_shape), tuple(metadata.latent_shape)

    def forward(self, z: Tensor, cond: Condition = None) -> Tensor:
        """Returns x (B, ...) float32 for z (B, ...) ~ N(0, I)."""
        metadata = self.metadata
        with torch.autocast(z.device.type, torch.bfloat16, enabled=metadata.precision == "bfloat16"):
            if self._whole:
                return self.network(z, cond).float()
            x = metadata.input_scale * z
            c_noise = torch.full((len(z),), metadata.c_noise, dtype=torch.float32, device=z.device)
            output = self.network((metadata.c_in * x).to(getattr(torch, metadata.dtype)), c_noise, cond)
            return (metadata.c_skip * x + metadata.c_out * output[:, : x.shape[1]]).float()

    @torch.no_grad()
    def sample(self, n: int, cond: Condition = None, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """Returns n samples (n, ...) float32, those of the trainer's `generate` for the same seed.

        Args:
            n: number of samples.
            cond: batched conditions. When None, a generator with classes takes all classes in
                turn.
            seed: seed of z; the trainer's when None.
            first_sample: global index of the first sample in noise stream 9.
        """
        device = next(self.parameters()).device
        noise = Noise(self.metadata.seed if seed is None else seed, first_sample=first_sample, device=device)
        z = ops.normal((n, *self.latent_shape), noise, stream=NoiseStream.SHOWN)
        if cond is None and self.metadata.num_classes:
            cond = torch.arange(first_sample, first_sample + n, device=device) % self.metadata.num_classes
        return self(z, cond)

    def encode(self, prompts: Sequence[str], *, embedded_guidance: float | None = None) -> Condition:
        """Encodes prompts with the text encoders in the folder.

        Args:
            embedded_guidance: for networks that take it as an input; None for the default of their pipeline.

        Raises:
            ValueError: there is no text encoder.
        """
        if self.folder is None or not isinstance(self.network, Network):
            raise ValueError("this generator has no text encoder")
        return ragged.trimmed(
            self.folder.text_encoder(self.network.model, self.sample_shape, embedded_guidance)(prompts)
        )

    def decode(self, samples: Tensor) -> Tensor:
        """Decodes latents with the folder's VAE; returns samples unchanged if there is none."""
        return samples if self.folder is None else self.folder.decode(samples)
