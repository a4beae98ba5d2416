"""The 1,797 handwritten 8x8 digits that scikit-learn ships, in one fixed train/test split."""

from __future__ import annotations

import torch
from torch import Tensor

from emd_fast import ops
from emd_fast.noise import Noise, NoiseStream
from emd_fast.tasks.image_data import ImageData

SHAPE = (1, 8, 8)
CLASSES = 10
# Standard deviation of all pixels of the train split, in [-1, 1], to two digits. It is a constant,
# so that a denoiser can be built and a checkpoint read without the data. A test measures it.
SIGMA_DATA = 0.75
_SPLIT_SEED = 0


def load(split: str) -> tuple[Tensor, Tensor]:
    """Loads one split of the real digits.

    The split is fixed: a third of each class, drawn by the noise contract, is held out for the
    test.

    Args:
        split: "train" (1,198 images) or "test" (599 images).

    Returns:
        Images (N, 1, 8, 8) float32 in [-1, 1] and labels (N,) int64 in [0, 10), in the order of
        the data set.

    Raises:
        ValueError: split is neither of the two.
        ModuleNotFoundError: scikit-learn is not installed.

    Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits" (UCI, 1998), its test
    part, as shipped by `sklearn.datasets.load_digits`: counts, 0 to 16, of black pixels in 4x4
    cells.
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


DIGITS = ImageData("the digits", SHAPE, CLASSES, SIGMA_DATA, load)
