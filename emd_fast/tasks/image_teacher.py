"""The teacher of labelled images: a small UNet or DiT, trained here on the real images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.config import ConfigError, TeacherConfig
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.schedules import EDM
from emd_fast.noise import Noise, NoiseStream
from emd_fast.tasks import image_transformer
from emd_fast.tasks.image_data import ImageData
from emd_fast.teachers.small_unet import SmallUNet, initialise
from emd_fast.train.average import EMA

_ADAM_BETAS = (0.9, 0.99)
_GRAD_CLIP = 1.0


def untrained(config: TeacherConfig, data: ImageData) -> Denoiser:
    """Builds the denoiser with the weights of `config.seed` (noise stream 13), for sigma in [0.002, 80].

    Of `config` it uses network, channels, patch, conditional, label_dropout and seed. With label_dropout the network
    has one more label, which stands for no class: it is `null_cond`, and what a condition of None means.

    Raises:
        ConfigError: patches that do not divide the images, or fewer than 2x2 of them.
    """
    if config.network == "dit":
        return image_transformer.untrained(config, data)
    if any(side % config.patch or side < 2 * config.patch for side in data.shape[1:]):
        size = "x".join(map(str, data.shape[1:]))
        raise ConfigError(f"teacher.patch must divide images of {size} pixels into 2x2 or more, got {config.patch}")
    classes = data.classes if config.conditional else 0
    null_label = classes if config.label_dropout else None
    network = SmallUNet(data.shape[0], config.channels, num_classes=classes, null_label=null_label, patch=config.patch)
    initialise(network, config.seed)
    return Denoiser(network, EDM(), "edm", sigma_data=data.sigma_data, sample_shape=data.shape, null_cond=null_label)


def train(
    config: TeacherConfig,
    data: ImageData,
    on_step: Callable[[int, Tensor], None] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Denoiser:
    """Trains the teacher on the train split: denoising score matching with the EDM loss weighting.

    Args:
        config: steps, batch_size, lr (peak value: linear warm-up over `warmup` steps, then cosine
            decay to 0), ema (decay per step), log_sigma_mean and log_sigma_std (of ln sigma, which
            is normal), channels, patch, conditional, label_dropout, seed.
        data: the images; its train split is used.
        on_step: called after every step with the number of steps done and the loss of the last
            one, a 0-dim tensor on `device`; reading it synchronises. An exception that it raises
            ends the training.
        device: where to train. The result stays there.

    Returns:
        The denoiser with the EMA of the weights, in eval mode. All randomness comes from the noise
        contract (streams 10 to 13), so the result depends on `config` alone, up to rounding on the
        device.

    Raises:
        FloatingPointError: the training diverged.

    Source: Karras et al. (arXiv 2206.00364). The optimizer and its settings are this project's
    own.
    """
    images, labels = (tensor.to(device) for tensor in data.load("train"))
    trained = untrained(config, data).to(device)
    average = EMA(trained, config.ema)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=config.lr, betas=_ADAM_BETAS, weight_decay=0.0, fused=True)
    noise = Noise(config.seed, device=device)

    for step in range(config.steps):
        noise.set(step=step)
        chosen = ops.integers(len(images), (config.batch_size,), noise, stream=NoiseStream.TEACHER_ORDER)
        x0, cond = images[chosen], labels[chosen] if config.conditional else None
        if cond is not None and config.label_dropout:
            kept = ops.uniform((config.batch_size,), noise, stream=NoiseStream.TEACHER_TIME, substep=1)
            cond = torch.where(kept < config.label_dropout, trained.null_cond, cond)
        t = torch.exp(
            config.log_sigma_mean
            + config.log_sigma_std * ops.normal((config.batch_size,), noise, stream=NoiseStream.TEACHER_TIME)
        )
        x_t = ops.perturb(x0, torch.ones_like(t), t, noise=noise, stream=NoiseStream.TEACHER_NOISE)
        c_skip, c_out = trained.coefficients(t)
        loss = ops.score_matching_loss(trained(x_t, t, cond), x0, x_t, c_skip, c_out, 1 / c_out**2).mean()

        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), _GRAD_CLIP)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * learning_rate_factor(step, config.steps, config.warmup)
        optimizer.step()
        average.update(trained, step)
        if on_step is not None:
            on_step(step + 1, loss.detach())

    if not all(bool(parameter.isfinite().all()) for parameter in average.module.parameters()):
        raise FloatingPointError(
            "the teacher's weights are not finite after training: lower its lr or raise its warmup"
        )
    return average.module.eval()


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Learning rate factor in (0, 1]: linear warm-up over `warmup` steps, cosine decay to 0 at `steps`."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
