"""Metrics of digits, in the features of a small classifier of real digits.

Every comparison is between two sets of equal size, because all of these metrics depend on the
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from emd_fast.tasks import digits_data, image_classifier
from emd_fast.tasks.image_classifier import ImageFeatures, Training
from emd_fast.tasks.image_metrics import METRICS, Reference, by_metric, check_sets, subset

# Substeps of noise stream 9 for the subsets drawn here. Samples use low substeps of that stream.
_PICK_TEST, _PICK_TRAIN = 60_000, 60_001


class DigitFeatures(ImageFeatures):
    """A small classifier of the real digits, whose last hidden layer gives the features for metrics.

    The constructor trains it on the train split in a few seconds. All randomness comes from the
    noise contract. Its accuracy on the held-out digits is above 98%.

    Args:
        seed: seed of the initial weights and of the training. Published figures use seed 0.
        steps: training steps, at batch size 128.
        device: where it is trained and used.
    """

    def __init__(self, seed: int = 0, steps: int = 400, device: torch.device | str = "cpu") -> None:
        training = Training(widths=(32, 64), steps=steps, noise=0.3, seed=seed)
        network = image_classifier.trained(digits_data.DIGITS, training, device)
        super().__init__(network, digits_data.SHAPE, device)


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
    features = DigitFeatures() if features is None else features
    test, train = digits_data.load("test"), digits_data.load("train")
    n = check_sets(samples, most=len(test[0]), default=len(test[0]))
    reference = Reference(features, *subset(test, n, seed, _PICK_TEST))
    compared: dict[str, tuple[Tensor, Tensor | None]] = {"real": subset(train, n, seed, _PICK_TRAIN), **samples}
    found = by_metric({name: reference.basic(images, labels) for name, (images, labels) in compared.items()})
    return {**{name: found.get(name, {}) for name in METRICS}, "n": n, "seed": seed}
