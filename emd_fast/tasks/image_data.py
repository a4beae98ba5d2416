"""A data set of labelled images, as the tasks that train their own teacher use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ImageData:
    """Labelled images in two splits.

    Attributes:
        name: what it is, in the words of an error.
        shape: (C, H, W) of an image.
        classes: number of classes.
        sigma_data: standard deviation of the pixels of the train split. It is a constant, so that a
            denoiser can be built and a checkpoint read without the data.
        load: (split) -> images (N, C, H, W) float32 in [-1, 1] and labels (N,) int64, for the split
            "train" or "test".
    """

    name: str
    shape: tuple[int, int, int]
    classes: int
    sigma_data: float
    load: Callable[[str], tuple[Tensor, Tensor]]
