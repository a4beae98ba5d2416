"""uint8 images for detectors, from a generator or from files."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Converts images (n, 1 or 3, H, W) in [-1, 1] to uint8 as EDM does.

    The value is 127.5 x + 128, clipped to [0, 255] and rounded down.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (n, 1 or 3, H, W), got {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("images must be finite: they hold NaN or infinite values")
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def rgb(images: Tensor) -> Tensor:
    """Returns images (n, 1 or 3, H, W) as (n, 3, H, W); a grey channel is repeated."""
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


class ImageFiles:
    """The images in a folder (with its subfolders) or in a .zip, sorted by name.

    All images have one size. Nothing is resized.

    Raises:
        ValueError: no such folder or .zip, or no image in it.
    """

    def __init__(self, path: str | Path) -> None:
        from PIL import Image

        self.path, self._open_image = Path(path), Image.open
        known = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
        self._bytes: Callable[[str], Any]
        if self.path.is_dir():
            names = [os.path.relpath(file, self.path) for file in self.path.rglob("*") if file.is_file()]
            self._bytes = lambda name: (self.path / name).read_bytes()
        elif zipfile.is_zipfile(self.path):
            archive = zipfile.ZipFile(self.path)
            names, self._bytes = archive.namelist(), archive.read
        else:
            raise ValueError(f"{path} is neither a folder nor a .zip of images")
        self._names = sorted(name for name in names if os.path.splitext(name)[1].lower() in known)
        if not self._names:
            raise ValueError(f"there is no image in {path}")
        self.shape = tuple(self._read(self._names[0]).shape)

    def __len__(self) -> int:
        return len(self._names)

    def __call__(self, first: int, n: int) -> Tensor:
        """Reads n images (n, 1 or 3, H, W) uint8, starting at index `first`.

        Raises:
            ValueError: an image cannot be read, or its size differs from the first image's.
        """
        images = []
        for name in self._names[first : first + n]:
            images.append(self._read(name))
            if images[-1].shape != self.shape:
                raise ValueError(
                    f"images must have one size: {self.path / name} is {size(images[-1].shape)}, "
                    f"{self._names[0]} is {size(self.shape)}; nothing is resized here"
                )
        return torch.stack(images)

    @functools.cached_property
    def sha256(self) -> str:
        """sha256 of the contents of the files, in order; names do not count."""
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(self._bytes(name))
        return digest.hexdigest()

    def _read(self, name: str) -> Tensor:
        from PIL import UnidentifiedImageError

        try:
            with self._open_image(io.BytesIO(self._bytes(name))) as image:
                mode, pixels = image.mode, np.array(image)
        except (OSError, UnidentifiedImageError, zipfile.BadZipFile, SyntaxError, ValueError) as error:
            raise ValueError(f"cannot read the image {self.path / name}: {error}") from None
        if mode not in ("L", "RGB"):
            raise ValueError(f"images must be grey or RGB of 8 bits: {self.path / name} has mode {mode}")
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def size(shape: Sequence[int]) -> str:
    """Formats a shape for messages, such as 3x64x64."""
    return "x".join(map(str, shape))
