"""Statistics of real images, from .npz files of EDM and ADM and .pkl files of EDM2."""

from __future__ import annotations

import io
import mmap
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emd_fast.io import arrays
from emd_fast.io.arrays import PlainArray, read_npz
from emd_fast.io.files import write_atomic
from emd_fast.io.pickles import PickleError, read
from emd_fast.metrics.detector import sha256_of
from emd_fast.metrics.distance import Moments
from emd_fast.metrics.images import size

_WANTED = "an .npz of EDM with mu and sigma, or a .pkl of EDM2"
_LARGEST = 2**29  # bytes of an array: the float64 covariance of 8,192 features


class BadReference(ValueError):
    """A file has no usable statistics. The message is one line that names the file."""


@dataclass(frozen=True)
class Reference:
    """Statistics of a data set.

    Args:
        path, sha256: path and SHA-256 of the file.
        moments: moments by the name of the metric ("fid"; EDM2 has "fd_dinov2" too).
        shape: (C, H, W) of the images, or None if the file does not state it.
        detector: SHA-256 of the detector's file, or None if the file does not state it.
    """

    path: Path
    sha256: str
    moments: dict[str, Moments]
    shape: tuple[int, ...] | None = None
    detector: str | None = None

    def of_width(self, width: int) -> Moments:
        """Returns the moments of features of this width.

        Raises:
            BadReference: the file has none of this width.
        """
        for moments in self.moments.values():
            if len(moments.mean) == width:
                return moments
        there = ", ".join(f"{len(moments.mean)} ({name})" for name, moments in self.moments.items())
        raise BadReference(f"{self.path} has statistics of {there} features, the detector gives {width}")

    def check(self, shape: tuple[int, ...], detector: str) -> None:
        """Checks the shape (C, H, W) of images and the SHA-256 of a detector against the file.

        A fact that the file does not state is not checked.

        Raises:
            BadReference: the shape or the detector differs.
        """
        if self.shape is not None and self.shape[1:] != shape[1:]:
            raise BadReference(
                f"{self.path} is of images of {size(self.shape)}, these are of {size(shape)}; nothing is resized here"
            )
        if self.detector not in (None, detector):
            raise BadReference(
                f"{self.path} was made with the detector {str(self.detector)[:12]}..., this is {detector[:12]}..."
            )


def load(path: str | Path) -> Reference:
    """Reads a reference file as data. Nothing in it is executed.

    Only the statistics of an .npz are read.

    Raises:
        BadReference: there is no such file, it is of another kind, or its statistics are invalid.
    """
    path = Path(path)
    if not path.is_file():
        raise BadReference(f"there is no reference {path}")
    try:
        moments, facts = (_npz if zipfile.is_zipfile(path) else _pkl)(path)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadReference(f"{path} is no reference ({_WANTED}): {reason}") from None
    return Reference(path, sha256_of(path), moments, **facts)


def save(path: str | Path, moments: Moments, shape: tuple[int, ...], detector: str) -> None:
    """Writes statistics in EDM's .npz format, which fid.py reads.

    The file also has the number of images, their shape and the SHA-256 of the detector.

    Args:
        path: path of the file.
        moments: mean and covariance of the features.
        shape: (C, H, W) of the images.
        detector: SHA-256 of the detector's file.
    """
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=moments.mean.numpy(),
        sigma=moments.covariance.numpy(),
        n=np.int64(moments.n or 0),
        shape=np.array(shape, np.int64),
        detector=np.array(detector),
    )
    write_atomic(Path(path), lambda file: file.write(buffer.getvalue()))


def _npz(path: Path) -> tuple[dict[str, Moments], dict[str, Any]]:
    found = read_npz(path, ("mu", "sigma", "n", "shape", "detector"), _LARGEST)
    if missing := {"mu", "sigma"} - found.keys():
        raise ValueError(f"it has {', '.join(sorted(found))}, and no {' or '.join(sorted(missing))}")
    return {"fid": _moments(found["mu"], found["sigma"], _count(found.get("n")))}, {
        "shape": _shape(found.get("shape")),
        "detector": _text(found.get("detector")),
    }


def _count(array: np.ndarray | None) -> int | None:
    if array is None:
        return None
    if array.shape != () or array.dtype.kind not in "iu" or not 0 <= int(array) < 2**62:
        raise ValueError("n must be a number of images")
    return int(array)


def _shape(array: np.ndarray | None) -> tuple[int, ...] | None:
    if array is None:
        return None
    if array.shape != (3,) or array.dtype.kind not in "iu" or not 0 < int(array.min()) <= int(array.max()) < 2**20:
        raise ValueError("shape must be (C, H, W) of the images")
    return tuple(array.tolist())


def _text(array: np.ndarray | None) -> str | None:
    if array is None:
        return None
    if array.shape != () or array.dtype.kind != "U" or array.nbytes > 1024:
        raise ValueError("detector must be a text of at most 256 characters")
    return str(array)


def _moments(mu: np.ndarray, sigma: np.ndarray, n: int | None) -> Moments:
    for name, array in (("mu", mu), ("sigma", sigma)):
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise ValueError(f"{name} must be an array of floating-point numbers")
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in (mu, sigma))
    return Moments(mean, covariance, n)


# EDM2's: {"num_images": n, "fid": {"mu": ..., "sigma": ...}, "fd_dinov2": ...} --------------------------------------


def _pkl(path: Path) -> tuple[dict[str, Moments], dict[str, Any]]:
    with open(path, "rb") as file:
        if not file.read(1):
            raise PickleError("the file is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as source:
            data, left = read(source, arrays.NAMES), len(source)
    if type(data) is not dict:
        raise PickleError("it holds no table")
    n = data.get("num_images")
    n = n if type(n) is int and 0 <= n < 2**62 else None
    found = {}
    for name, entry in data.items():
        if type(entry) is dict and {"mu", "sigma"} <= entry.keys():
            mu, sigma = (_value(key, entry[key]) for key in ("mu", "sigma"))
            # Many entries that share one array would take much memory for a small file.
            left -= mu.nbytes + sigma.nbytes
            if left < 0:
                raise PickleError("the arrays claim more bytes than the file has")
            found[str(name)] = _moments(mu, sigma, n)
    if not found:
        raise PickleError(f"it has {', '.join(map(repr, data))[:100] or 'nothing'}, and no entry with mu and sigma")
    return found, {}


def _value(key: str, entry: Any) -> np.ndarray:
    if not isinstance(entry, PlainArray):
        raise PickleError(f"{key} must be an array of numpy")
    return entry.value()
