"""Fashion-MNIST: 70,000 grey images of clothes in ten classes, read from its four IDX files."""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from emd_fast.io.reading import read_bytes, reason
from emd_fast.tasks.image_data import ImageData

CLASSES = 10
RESOLUTIONS = (14, 28)
FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package dataset-fashion-mnist puts the files."""
VARIABLE = "EMD_FAST_FASHION"
"""The environment variable that names another folder."""
_SIDE = 28
# Standard deviation of all pixels of the train split in [-1, 1], by resolution, to two digits.
_SIGMA_DATA = {14: 0.66, 28: 0.71}
_PARTS = {"train": "train", "test": "t10k"}
_IMAGES, _LABELS = 0x803, 0x801  # magic numbers: unsigned bytes of three dimensions, of one
_LARGEST = 2**27  # bytes of a file after decompression; the largest of Fashion-MNIST has 47 million


class BadData(ValueError):
    """A folder without usable IDX files. The message is one line that names the file."""


@dataclass(frozen=True)
class Split:
    """Images (N, 28, 28) uint8 and labels (N,) int64, in the order of the files."""

    images: Tensor
    labels: Tensor


def data(folder: str, resolution: int) -> ImageData:
    """Describes the data set in a folder. Nothing is read before `load` is called.

    Args:
        folder: the folder with the files; "" for that of the environment variable EMD_FAST_FASHION, or
            the one of Debian's package.
        resolution: 28, or 14 for the mean of each 2x2 pixels.

    Raises:
        ValueError: another resolution.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(f"resolution must be 14 or 28, got {resolution}")
    place = place_of(folder)

    def load(split: str) -> tuple[Tensor, Tensor]:
        return _images(place, resolution, split)

    return ImageData("Fashion-MNIST", (1, resolution, resolution), CLASSES, _SIGMA_DATA[resolution], load)


def place_of(folder: str) -> Path:
    """The folder that `folder` stands for."""
    return Path(folder or os.environ.get(VARIABLE) or FOLDER)


@functools.cache
def digest(folder: Path) -> str:
    """SHA-256 of all images and labels in a folder, compressed or not.

    Raises:
        BadData: as for `read`.
    """
    found = hashlib.sha256()
    for part in _PARTS:
        split = read(folder, part)
        found.update(split.images.numpy().tobytes() + split.labels.numpy().tobytes())
    return found.hexdigest()


@functools.lru_cache(2)
def _images(folder: Path, resolution: int, split: str) -> tuple[Tensor, Tensor]:
    found = read(folder, split)
    images = found.images[:, None].float()
    if resolution < _SIDE:
        images = avg_pool2d(images, _SIDE // resolution)
    return images / 127.5 - 1, found.labels


def read(folder: Path, split: str) -> Split:
    """Reads one split as it is in the files.

    Args:
        folder: holds train-images-idx3-ubyte and train-labels-idx1-ubyte, and the same of t10k, each
            plain or with the ending .gz.
        split: "train" (60,000 images) or "test" (10,000).

    Raises:
        BadData: a file is missing, truncated, has another magic number or other sizes; images and labels
            differ in number; a label is not in [0, 10).
        ValueError: split is neither of the two.

    Source: Xiao, Rasul and Vollgraf, arXiv 1708.07747.
    """
    if split not in _PARTS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    part = _PARTS[split]
    if not folder.is_dir():
        raise BadData(
            f"there is no folder {folder} with the files of Fashion-MNIST: give --data FOLDER, set {VARIABLE}, or "
            "install Debian's package dataset-fashion-mnist"
        )
    image_path, images = _array(folder, f"{part}-images-idx3-ubyte", _IMAGES, 3)
    label_path, labels = _array(folder, f"{part}-labels-idx1-ubyte", _LABELS, 1)
    if images.shape[1:] != (_SIDE, _SIDE):
        height, width = images.shape[1:]
        raise BadData(f"{image_path} has images of {height}x{width}, they must be of 28x28")
    if len(images) != len(labels):
        raise BadData(f"{image_path} has {len(images)} images, and {label_path.name} has {len(labels)} labels")
    if not len(labels):
        raise BadData(f"{image_path} has no images")
    if labels.max() >= CLASSES:
        raise BadData(f"{label_path} has the label {labels.max()}, they must be below {CLASSES}")
    return Split(images, labels.long())


def _array(folder: Path, name: str, magic: int, dimensions: int) -> tuple[Path, Tensor]:
    """The path of an IDX file and its array of unsigned bytes."""
    path = next((at for at in (folder / name, folder / f"{name}.gz") if at.exists()), None)
    if path is None:
        raise BadData(f"{folder} has no file {name} or {name}.gz of Fashion-MNIST: give --data FOLDER")
    try:
        content = read_bytes(path, _LARGEST)
        if content[:2] == b"\x1f\x8b":
            content = _unpacked(path)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise BadData(f"cannot read {path}: {reason(error)}") from None
    header = 4 + 4 * dimensions
    found = int.from_bytes(content[:4], "big")
    if len(content) >= 4 and found != magic:
        raise BadData(f"{path} is no such IDX file: its magic number is {found:#010x}, not {magic:#010x}")
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    size = header + math.prod(shape)
    if len(content) < header or len(content) != size:
        raise BadData(f"{path} is truncated or damaged: it has {len(content):,} bytes, its header says {size:,}")
    return path, torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)


def _unpacked(path: Path) -> bytes:
    with gzip.open(path) as file:
        content = file.read(_LARGEST + 1)
    if len(content) > _LARGEST:
        raise ValueError(f"it has more than {_LARGEST:,} bytes when it is unpacked")
    return content
