"""A teacher trained here: class-conditional diffusion on the 1,797 handwritten 8x8 digits that scikit-learn ships."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.schedules import EDM
from emd_fast.noise import Noise, NoiseStream
from emd_fast.teachers.small_unet import SmallUNet, initialise
from emd_fast.train.average import EMA

if TYPE_CHECKING:
    from emd_fast.config import TeacherConfig

SHAPE = (1, 8, 8)
CLASSES = 10
# Standard deviation of all pixels of the train split, in [-1, 1], to two digits (tests/test_digits.py measures it). A
# constant, so that a denoiser can be built and a checkpoint read without the data.
SIGMA_DATA = 0.75
_SPLIT_SEED = 0
_ADAM_BETAS = (0.9, 0.99)
_GRAD_CLIP = 1.0


def load(split: str) -> tuple[Tensor, Tensor]:
    """The real digits, one fixed split: in each class a third, drawn by the noise contract, is held out for the test.

    Args:
        split: "train" (1,198 images) or "test" (599 images).

    Returns:
        images (N, 1, 8, 8) float32 in [-1, 1] and labels (N,) int64 in [0, 10), in the order of the data set.

    Raises:
        ValueError: another split. ModuleNotFoundError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits" (UCI, 1998), its test part, as shipped by
    scikit-learn (`sklearn.datasets.load_digits`): counts 0 to 16 of black pixels in 4x4 cells.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the digits come with scikit-learn: install it with `pip install "emd_fast[digits]"`', name=error.name
        ) from error
    counts, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(counts).float().reshape(-1, *SHAPE) / 8 - 1
    labels = torch.from_numpy(targets).long()

    drawn = ops.uniform((len(labels),), Noise(_SPLIT_SEED), stream=NoiseStream.TEACHER_ORDER)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(CLASSES):
        members = (labels == digit).nonzero()[:, 0]
        held_out[members[drawn[members].argsort(stable=True)][: round(len(members) / 3)]] = True
    chosen = held_out if split == "test" else ~held_out
    return images[chosen], labels[chosen]


def network(config: TeacherConfig) -> SmallUNet:
    """The untrained network, its weights those of `config.seed` (stream 13). Uses channels, conditional and seed."""
    built = SmallUNet(SHAPE[0], config.channels, num_classes=CLASSES if config.conditional else 0)
    initialise(built, config.seed)
    return built


def denoiser(network: torch.nn.Module) -> Denoiser:
    """The network with the preconditioning of EDM: a denoiser of digits, sigma in [0.002, 80]."""
    return Denoiser(network, EDM(), "edm", sigma_data=SIGMA_DATA, sample_shape=SHAPE)


def train(
    config: TeacherConfig,
    on_step: Callable[[int, Tensor], None] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Denoiser:
    """Trains the teacher on the train split, by denoising score matching with the weighting of EDM.

    Args:
        config: steps, batch_size, lr (peak; linear warm-up over `warmup` steps, then a cosine to 0), ema (decay a
            step), log_sigma_mean and log_sigma_std (natural logarithm of sigma ~ normal), channels, conditional, seed.
        on_step: called after every step with the number of steps done and their last loss, a tensor without
            dimensions (reading it waits for the device). What it raises ends the training.
        device: where to train, and where the result is.

    Returns:
        The denoiser with the average of the weights, in eval mode. All randomness is the noise contract's (streams 10
        to 13), so it depends on the config alone, up to the arithmetic of the device.

    Raises:
        FloatingPointError: the training diverged.

    Source: Karras et al. (arXiv 2206.00364); the choice of optimizer and numbers is the project's own.
    """
    images, labels = (data.to(device) for data in load("train"))
    trained = denoiser(network(config)).to(device)
    average = EMA(trained, config.ema)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=config.lr, betas=_ADAM_BETAS, weight_decay=0.0, fused=True)
    noise = Noise(config.seed, device=device)

    for step in range(config.steps):
        noise.set(step=step)
        chosen = ops.integers(len(images), (config.batch_size,), noise, stream=NoiseStream.TEACHER_ORDER)
        x0, cond = images[chosen], labels[chosen] if config.conditional else None
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
    """In (0, 1]: linear to 1 over the first `warmup` steps, times half a cosine wave that is 0 at `steps`."""
    return min(1.0, (step + 1) / max(warmup, 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))
