"""Metrics of sets of labelled images, in the features of a classifier.

Every comparison is between two sets of equal size, because all of these metrics depend on the
size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.metrics.distance import frechet
from emd_fast.metrics.inception import InceptionScore
from emd_fast.metrics.neighbours import Manifold
from emd_fast.noise import Noise, NoiseStream
from emd_fast.tasks.image_classifier import ImageFeatures

METRICS = ("frechet", "recall", "precision", "accuracy")
"""What `Reference.basic` returns, in the order of tables."""
LabelledSet = tuple[Tensor, Tensor | None]
"""Images (N, C, H, W) in [-1, 1], and the labels (N,) int64 that they were generated for, or None."""


class Reference:
    """Real images that sets are compared with.

    Args:
        features: the classifier.
        images, labels: the real images and their labels.
    """

    def __init__(self, features: ImageFeatures, images: Tensor, labels: Tensor) -> None:
        self.classifier, self.labels = features, labels
        self.features = features.features(images)

    @functools.cached_property
    def _manifold(self) -> Manifold:
        return Manifold(self.features)

    def basic(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """Returns "frechet", "recall", "precision" (k = 3) and, with labels, "accuracy" of a set.

        The accuracy is the share of images for which the classifier predicts the label.
        """
        return self._compare(self.classifier.features(images), labels)[0]

    def full(self, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """Returns `basic` and what follows from the classes.

        "recall_by_class" has the recall among the real images of each class. "inception_score" is that of
        the classifier, over ten splits. "total_variation" is half the sum of the differences between the
        shares of the classes that the classifier predicts and those of the real images.
        """
        found = self.classifier.features(images)
        metrics, covered = self._compare(found, labels)
        logits = self.classifier.logits(found).double()
        score = InceptionScore(len(images), min(10, len(images)))
        score.add(logits.softmax(1), 0)
        classes = logits.shape[1]
        shares, due = (
            torch.bincount(each, minlength=classes).double() / len(each)
            for each in (logits.argmax(1), self.labels.to(logits.device))
        )
        return {
            **metrics,
            "recall_by_class": [_mean(covered[self.labels == label]) for label in range(classes)],
            "inception_score": score.value(whole=True)[0],
            "total_variation": (shares - due).abs().sum().item() / 2,
        }

    def _compare(self, found: Tensor, labels: Tensor | None) -> tuple[dict[str, Any], Tensor]:
        """The metrics of a set with these features, and which real images its manifold covers."""
        in_real, covered = self._manifold.compare(found)
        metrics = {
            "frechet": frechet(self.features, found),
            "recall": _mean(covered),
            "precision": _mean(in_real),
        }
        if labels is not None:
            metrics["accuracy"] = _mean(self.classifier.logits(found).argmax(1) == labels.to(found.device))
        return metrics, covered


def _mean(which: Tensor) -> float | None:
    return which.double().mean().item() if len(which) else None


def by_metric(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Turns set name -> metric -> value into metric -> set name -> value."""
    found: dict[str, Any] = {}
    for name, metrics in sets.items():
        for metric, value in metrics.items():
            found.setdefault(metric, {})[name] = value
    return found


def check_sets(samples: Mapping[str, LabelledSet], most: int, default: int) -> int:
    """Returns the size of the sets, `default` if there are none.

    Raises:
        ValueError: sets of unequal size, below 4 or above `most`; a set called "real"; images with values
            that are not finite.
    """
    if "real" in samples:
        raise ValueError('the set "real" is taken from the data: give the generated sets another name')
    n = next((len(images) for images, _ in samples.values()), default)
    for name, (images, labels) in samples.items():
        if len(images) != n or (labels is not None and labels.shape != (n,)):
            raise ValueError(
                f"every set needs {n} images, as the first has, and as many labels: {name!r} has {len(images)} images "
                f"and labels {None if labels is None else tuple(labels.shape)}"
            )
        if not images.isfinite().all():
            raise ValueError(f"images must be finite: {name!r} holds NaN or infinite values")
    if not 4 <= n <= most:
        raise ValueError(f"a set needs 4 to {most} images, the size of the test split, got {n}")
    return n


def subset(data: tuple[Tensor, Tensor], n: int, seed: int, substep: int) -> tuple[Tensor, Tensor]:
    """Draws n images of a split with their labels (noise stream 9)."""
    drawn = ops.uniform((len(data[0]),), Noise(seed), stream=NoiseStream.SHOWN, substep=substep)
    chosen = drawn.argsort(stable=True)[:n]
    return data[0][chosen], data[1][chosen]
