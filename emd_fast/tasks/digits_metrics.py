"""Metrics of digits, in the features of a small classifier of real digits.

Every comparison is between two sets of equal size, because all of these metrics depend on the
size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from emd_fast import ops
from emd_fast.metrics.distance import frechet
from emd_fast.metrics.neighbours import precision_recall
from emd_fast.noise import Noise, NoiseStream
from emd_fast.tasks import digits_data
from emd_fast.tasks.digits_teacher import learning_rate_factor
from emd_fast.teachers.small_unet import initialise

_CHUNK = 1024  # images at a time
# Substeps of noise stream 9 for the subsets drawn here. Samples use low substeps of that stream.
_PICK_TEST, _PICK_TRAIN = 60_000, 60_001


class DigitFeatures:
    """A small classifier of the real digits, whose last hidden layer gives the features for metrics.

    The constructor trains it on the train split in a few seconds. All randomness comes from the
    noise contract. Its accuracy on the held-out digits is above 98%.

    Args:
        seed: seed of the initial weights and of the training. Published figures use seed 0.
        steps: training steps, at batch size 128.
        device: where it is trained and used.
    """

    def __init__(self, seed: int = 0, steps: int = 400, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._network = _Classifier()
        initialise(self._network, seed)
        self._network.to(device)
        with _one_thread():
            self._train(seed, steps)

    def _train(self, seed: int, steps: int) -> None:
        images, labels = (data.to(self.device) for data in digits_data.load("train"))
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
        noise = Noise(seed, device=self.device)
        for step in range(steps):
            noise.set(step=step)
            chosen = ops.integers(len(images), (_BATCH,), noise, stream=NoiseStream.TEACHER_ORDER)
            level = torch.full((_BATCH,), _AUGMENTATION, device=self.device)
            # Noise on the images regularises: features must not fit the train split more closely than
            # new digits.
            noisy = ops.perturb(
                images[chosen], torch.ones_like(level), level, noise=noise, stream=NoiseStream.TEACHER_NOISE
            )
            for group in optimizer.param_groups:
                group["lr"] = _LEARNING_RATE * learning_rate_factor(step, steps, warmup=20)
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(self._network(noisy), labels[chosen]).backward()
            optimizer.step()
        self._network.eval().requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Features (N, 64) float32 of images (N, 1, 8, 8) in [-1, 1].

        Raises:
            ValueError: images of another shape.
        """
        return torch.cat([self._network.features(batch) for batch in self._batches(images)])

    def predict(self, images: Tensor) -> Tensor:
        """Predicted labels (N,) int64 of images (N, 1, 8, 8) in [-1, 1].

        Raises:
            ValueError: images of another shape.
        """
        return torch.cat([self._network(batch).argmax(1) for batch in self._batches(images)])

    def _batches(self, images: Tensor) -> list[Tensor]:
        if images.shape[1:] != digits_data.SHAPE:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, digits_data.SHAPE))}), got {tuple(images.shape)}"
            )
        return list(images.detach().to(self.device, torch.float32).split(_CHUNK))


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


_BATCH = 128
_LEARNING_RATE = 3e-3
_AUGMENTATION = 0.3  # standard deviation of the noise, images in [-1, 1]


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.hidden = nn.Linear(64 * 16, 64)
        self.last = nn.Linear(64, digits_data.CLASSES)

    def features(self, images: Tensor) -> Tensor:
        return silu(self.hidden(silu(self.conv2(silu(self.conv1(images)))).flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.features(images))


def digits_metrics(
    samples: Mapping[str, tuple[Tensor, Tensor | None]], features: DigitFeatures | None = None, seed: int = 0
) -> dict[str, Any]:
    """Compares sets of digits with the held-out test split, at equal set sizes.

    Give the sets the labels of the test split (`digits_data.load("test")`), so that a difference
    in class frequencies does not count as a difference in quality.

    Args:
        samples: name -> (images, labels): images (N, 1, 8, 8) in [-1, 1], and the labels (N,)
            int64 that they were generated for, or None, which leaves accuracy out. All sets have
            one N, 4 to 599. The set "real" is added: N images of the train split, drawn by `seed`.
        features: the classifier; a new one of seed 0 is trained when None.
        seed: seed of the choice of train images and, for N below 599, of test images.

    Returns:
        "frechet", "recall", "precision" (k = 3) and "accuracy" (the classifier predicts the
        requested label), each a dict from "real" and the names in `samples` to a number; "n";
        "seed".

    Raises:
        ValueError: sets of unequal size, N out of range, a set called "real", or images of another
            shape or with values that are not finite.
    """
    if "real" in samples:
        raise ValueError('the set "real" is taken from the data: give the generated sets another name')
    features = DigitFeatures() if features is None else features
    test, train = digits_data.load("test"), digits_data.load("train")
    n = next((len(images) for images, _ in samples.values()), len(test[0]))
    for name, (images, labels) in samples.items():
        if len(images) != n or (labels is not None and labels.shape != (n,)):
            raise ValueError(
                f"every set needs {n} images, as the first has, and as many labels: {name!r} has {len(images)} images "
                f"and labels {None if labels is None else tuple(labels.shape)}"
            )
        if not images.isfinite().all():
            raise ValueError(f"images must be finite: {name!r} holds NaN or infinite values")
    if not 4 <= n <= len(test[0]):
        raise ValueError(f"a set needs 4 to {len(test[0])} images, the size of the test split, got {n}")

    reference = features.features(_subset(test, n, seed, _PICK_TEST)[0])
    metrics: dict[str, Any] = {"frechet": {}, "recall": {}, "precision": {}, "accuracy": {}, "n": n, "seed": seed}
    compared: dict[str, tuple[Tensor, Tensor | None]] = {"real": _subset(train, n, seed, _PICK_TRAIN), **samples}
    for name, (images, labels) in compared.items():
        found = features.features(images)
        metrics["frechet"][name] = frechet(reference, found)
        metrics["precision"][name], metrics["recall"][name] = precision_recall(reference, found)
        if labels is not None:
            right = features.predict(images) == labels.to(features.device)
            metrics["accuracy"][name] = right.double().mean().item()
    return metrics


def _subset(data: tuple[Tensor, Tensor], n: int, seed: int, substep: int) -> tuple[Tensor, Tensor]:
    drawn = ops.uniform((len(data[0]),), Noise(seed), stream=NoiseStream.SHOWN, substep=substep)
    chosen = drawn.argsort(stable=True)[:n]
    return data[0][chosen], data[1][chosen]
