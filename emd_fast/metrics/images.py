"""uint8 images for detectors, from a generator or from files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from emd_fast.metrics.image_source import open_source, summary

# Pillow's readers that decode pixels and start nothing: that of EPS runs Ghostscript on the file, which is a program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_MOST_PIXELS = 2**26  # 8,192 x 8,192


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
    """The images in a folder (with its subfolders) or in a .zip, sorted by name (`image_source`).

    All images have one size; nothing is resized. Grey images among RGB ones are repeated to RGB.

    Attributes:
        path: the folder or the .zip.
        shape: (1 or 3, H, W); 3 if any of the images is RGB.
        summary: one line: how many files are taken, how many are left out, and why.

    Raises:
        ValueError: no such folder or .zip, no image in it, or a file that cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        from PIL import Image

        self.path = Path(path)
        endings = Image.registered_extensions()  # which loads all readers
        self._formats = [format for format in _FORMATS if format in Image.OPEN]
        known = {ending for ending, format in endings.items() if format in self._formats}
        self._source = open_source(self.path, known)
        self.summary = summary(self.path, self._source)
        self._names = self._source.names
        self.shape = (1, *self._read(self._names[0]).shape[1:])
        if any(self._mode(name) == "RGB" for name in self._names):
            self.shape = (3, *self.shape[1:])

    def __len__(self) -> int:
        return len(self._names)

    def __call__(self, first: int, n: int) -> Tensor:
        """Reads n images (n, 1 or 3, H, W) uint8, starting at index `first`.

        Raises:
            ValueError: an image cannot be read, or its size differs from the first image's.
        """
        images = [self._read(name, self.shape) for name in self._names[first : first + n]]
        return torch.stack([image.expand(self.shape) for image in images])

    def check(self) -> None:
        """Looks at the header of every image. A training should not end at a file that could be seen before it.

        Raises:
            ValueError: an image that cannot be opened, or whose size differs from the first image's.
        """
        for name in self._names:
            with self._opened(name) as image:
                self._check_size(name, image, self.shape)

    def _check_size(self, name: str, image: Any, shape: Sequence[int]) -> None:
        here = (image.height, image.width)
        if here != tuple(shape[1:]):
            raise _Refused(
                f"images must have one size: {self.path / name} is {size(here)}, "
                f"{self._names[0]} is {size(shape[1:])}; nothing is resized here"
            )

    @functools.cached_property
    def sha256(self) -> str:
        """sha256 of the contents of the files, in order; names do not count."""
        digest = hashlib.sha256()
        for name in self._names:
            digest.update(self._source.read(name))
        return digest.hexdigest()

    def _mode(self, name: str) -> str:
        with self._opened(name) as image:
            return image.mode

    def _read(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        with self._opened(name) as image:
            if shape is not None:
                self._check_size(name, image, shape)
            pixels = np.array(image)
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        """Opens an image and checks its header. Decoding errors inside the block are one ValueError."""
        from PIL import Image, UnidentifiedImageError

        file = self.path / name
        try:
            with Image.open(io.BytesIO(self._source.read(name)), formats=self._formats) as image:
                if image.mode not in ("L", "RGB"):
                    raise _Refused(f"images must be grey or RGB of 8 bits: {file} has mode {image.mode}")
                if image.width * image.height > _MOST_PIXELS:
                    raise _Refused(
                        f"{file} claims {image.width} x {image.height} pixels: at most {_MOST_PIXELS:,} are read"
                    )
                yield image
        except (_Refused, KeyboardInterrupt):
            raise
        except UnidentifiedImageError:  # its message has the address of the buffer
            raise ValueError(f"cannot read the image {file}: it is none of {', '.join(self._formats)}") from None
        except Exception as error:  # the decoders of damaged files raise errors of many classes
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot read the image {file}: {reason}") from None


class _Refused(ValueError):
    """An image that can be read, and is not of the kind that is wanted."""


def size(shape: Sequence[int]) -> str:
    """Formats a shape for messages, such as 3x64x64."""
    return "x".join(map(str, shape))
