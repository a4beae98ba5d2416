"""A one-step generator that stands alone: a network, and the few numbers that make it a generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from emd_fast import ops
from emd_fast.diffusion.denoiser import Condition
from emd_fast.noise import Noise, NoiseStream
from emd_fast.teachers.diffusers.architectures import Network
from emd_fast.teachers.diffusers.folder import Folder


@dataclass(frozen=True)
class Facts:
    """What is written beside the weights.

    Args:
        c_skip, c_out, c_in, c_noise, input_scale: the generator, as the module's formula has it.
        sample_shape, latent_shape: of one x and one z.
        precision: "float32" or "bfloat16", the compute dtype (autocast) that the trainer sampled in.
        dtype: of the weights.
        seed, num_classes: with which `sample` draws as the trainer's `generate` did.
        steps: optimizer steps that the generator was trained for. ema: whether it is the average of the weights.
        t_star: the noise level in the teacher's t, for people.
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
    """A generator from disk: `one_step(z, cond)` is x. Nothing of the trainer is needed.

    Args:
        network: F, called as network(x, c_noise, cond); or, `whole`, the generator itself, called as network(z, cond).
        facts: what was written with it. folder: of the components around it, where it came from one.
    """

    def __init__(self, network: nn.Module, facts: Facts, *, whole: bool = False, folder: Folder | None = None) -> None:
        super().__init__()
        self.network, self.facts, self.folder, self._whole = network, facts, folder, whole
        self.sample_shape, self.latent_shape = tuple(facts.sample_shape), tuple(facts.latent_shape)

    def forward(self, z: Tensor, cond: Condition = None) -> Tensor:
        """x (B, ...) float32 for z (B, ...) ~ N(0, I)."""
        facts = self.facts
        with torch.autocast(z.device.type, torch.bfloat16, enabled=facts.precision == "bfloat16"):
            if self._whole:
                return self.network(z, cond).float()
            x = facts.input_scale * z
            c_noise = torch.full((len(z),), facts.c_noise, dtype=torch.float32, device=z.device)
            output = self.network((facts.c_in * x).to(getattr(torch, facts.dtype)), c_noise, cond)
            return (facts.c_skip * x + facts.c_out * output[:, : x.shape[1]]).float()

    @torch.no_grad()
    def sample(self, n: int, cond: Condition = None, *, seed: int | None = None, first_sample: int = 0) -> Tensor:
        """n samples (n, ...) float32; those of the trainer's `generate` for the same seed, by default its own.

        Args:
            cond: batched conditions; classes in turn when None and the generator has classes.
            first_sample: where in the stream of shown samples to start.
        """
        device = next(self.parameters()).device
        noise = Noise(self.facts.seed if seed is None else seed, first_sample=first_sample, device=device)
        z = ops.normal((n, *self.latent_shape), noise, stream=NoiseStream.SHOWN)
        if cond is None and self.facts.num_classes:
            cond = torch.arange(first_sample, first_sample + n, device=device) % self.facts.num_classes
        return self(z, cond)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Conditions for prompts, by the text encoders in the folder.

        Raises:
            ValueError: there are none.
        """
        if self.folder is None or not isinstance(self.network, Network):
            raise ValueError("this generator has no text encoder")
        return self.folder.encode(list(prompts), self.network.model)

    def decode(self, samples: Tensor) -> Tensor:
        """Images of latents by the folder's VAE; the samples themselves where there is none."""
        return samples if self.folder is None else self.folder.decode(samples)
