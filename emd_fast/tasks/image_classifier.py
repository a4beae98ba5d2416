"""A small classifier of labelled images, whose last hidden layer gives the features for metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from emd_fast import ops
from emd_fast.noise import Noise, NoiseStream
from emd_fast.tasks.image_data import ImageData
from emd_fast.tasks.image_teacher import learning_rate_factor
from emd_fast.teachers.small_unet import initialise
from emd_fast.train.average import EMA

FEATURES = 64
_CHUNK = 1024  # images at a time
_BATCH = 128
_LEARNING_RATE = 3e-3
_GROUPS = 4  # of every norm


@dataclass(frozen=True)
class Training:
    """How a classifier is trained, at batch size 128.

    Attributes:
        widths: channels of its convolutions. All but the first have stride 2.
        steps: training steps.
        noise: standard deviation of the noise on the images, which are in [-1, 1]. It regularises:
            features must not fit the train split more closely than new images.
        flip: mirror half of the images.
        norm: a GroupNorm behind each convolution, which trains faster.
        ema: decay per step of the average of the weights, with the warm-up of `train.average.constant`. 0 is no
            average.
        seed: seed of the initial weights, the order and the noise.
    """

    widths: tuple[int, ...]
    steps: int
    noise: float
    flip: bool = False
    norm: bool = False
    ema: float = 0.0
    seed: int = 0


class ImageFeatures:
    """A trained classifier, used on one device.

    Attributes:
        shape: (C, H, W) of its images.
        device: where it computes.
    """

    def __init__(self, network: Classifier, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.shape, self.device = shape, torch.device(device)
        self._network = network.to(device).eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Features (N, 64) float32 of images (N, C, H, W) in [-1, 1].

        Raises:
            ValueError: images of another shape.
        """
        return torch.cat([self._network.features(batch) for batch in self._batches(images)])

    def predict(self, images: Tensor) -> Tensor:
        """Predicted labels (N,) int64 of images (N, C, H, W) in [-1, 1].

        Raises:
            ValueError: images of another shape.
        """
        return torch.cat([self._network(batch).argmax(1) for batch in self._batches(images)])

    def logits(self, features: Tensor) -> Tensor:
        """Logits (N, classes) of the features of images."""
        found: Tensor = self._network.last(features)
        return found

    def _batches(self, images: Tensor) -> list[Tensor]:
        if images.shape[1:] != self.shape:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, self.shape))}), got {tuple(images.shape)}"
            )
        return list(images.detach().to(self.device, torch.float32).split(_CHUNK))


class Classifier(nn.Module):
    """Convolutions, each with a norm if `norm` and SiLU, a hidden layer of 64 units, and a linear layer."""

    def __init__(
        self, shape: tuple[int, int, int], classes: int, widths: tuple[int, ...], *, norm: bool = False
    ) -> None:
        super().__init__()
        channels = (shape[0], *widths)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels[i], channels[i + 1], 3, stride=1 if i == 0 else 2, padding=1) for i in range(len(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(_GROUPS, width) if norm else nn.Identity() for width in widths)
        height, width = (-(-side // 2 ** (len(widths) - 1)) for side in shape[1:])
        self.hidden = nn.Linear(widths[-1] * height * width, FEATURES)
        self.last = nn.Linear(FEATURES, classes)

    def features(self, images: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            images = silu(norm(convolution(images)))
        return silu(self.hidden(images.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.features(images))
        return logits


def untrained(data: ImageData, training: Training) -> Classifier:
    """Builds the classifier with the initial weights of `training.seed`."""
    network = Classifier(data.shape, data.classes, training.widths, norm=training.norm)
    initialise(network, training.seed)
    return network


def trained(data: ImageData, training: Training, device: torch.device | str = "cpu") -> Classifier:
    """Trains a classifier on the train split, on one thread. All randomness is the noise contract's.

    Returns:
        The network with the average of the weights that `training.ema` asks for.
    """
    network = untrained(data, training).to(device)
    with _one_thread():
        return _train(network, data, training, torch.device(device))


def _train(network: Classifier, data: ImageData, training: Training, device: torch.device) -> Classifier:
    images, labels = (tensor.to(device) for tensor in data.load("train"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
    average = EMA(network, training.ema)
    noise = Noise(training.seed, device=device)
    for step in range(training.steps):
        noise.set(step=step)
        chosen = ops.integers(len(images), (_BATCH,), noise, stream=NoiseStream.TEACHER_ORDER)
        level = torch.full((_BATCH,), training.noise, device=device)
        noisy = ops.perturb(
            images[chosen], torch.ones_like(level), level, noise=noise, stream=NoiseStream.TEACHER_NOISE
        )
        if training.flip:
            mirrored = ops.uniform((_BATCH,), noise, stream=NoiseStream.TEACHER_TIME) < 0.5
            noisy = torch.where(mirrored[:, None, None, None], noisy.flip(3), noisy)
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * learning_rate_factor(step, training.steps, warmup=20)
        optimizer.zero_grad(set_to_none=True)
        cross_entropy(network(noisy), labels[chosen]).backward()
        optimizer.step()
        average.update(network, step)
    return average.module


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Runs the block on one thread.

    A network this small gains nothing from a second thread, and on shared cores the second thread
    makes it ten times slower. One thread also fixes the order of summation, so that the features
    do not depend on the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
