"""Statistics of real images: EDM's .npz files, EDM2's .pkl files, and those that are made here."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emd_fast.io import plain_arrays
from emd_fast.io.files import write_whole
from emd_fast.io.plain_arrays import PlainArray
from emd_fast.io.plain_pickle import PickleError, read
from emd_fast.metrics.detector import sha256_of
from emd_fast.metrics.distance import Moments
from emd_fast.metrics.images import size

_WANTED = "an .npz of EDM with mu and sigma, or a .pkl of EDM2"
_LARGEST = 2**30  # bytes of an array; 2048 features have a covariance of 32 MiB


class BadReference(ValueError):
    """A file that holds no statistics: one line that names it and what is wanted."""


@dataclass(frozen=True)
class Reference:
    """Statistics of a data set.

    Args:
        path, sha256: of the file.
        moments: by the name of their detector ("fid"; EDM2 has "fd_dinov2" too).
        shape: (C, H, W) of the images, and detector: the sha256 of its file; None where the file does not say.
    """

    path: Path
    sha256: str
    moments: dict[str, Moments]
    shape: tuple[int, ...] | None = None
    detector: str | None = None

    def of_width(self, width: int) -> Moments:
        """The moments of features of so many numbers.

        Raises:
            BadReference: there are none.
        """
        for moments in self.moments.values():
            if len(moments.mean) == width:
                return moments
        there = ", ".join(f"{len(moments.mean)} ({name})" for name, moments in self.moments.items())
        raise BadReference(f"{self.path} has statistics of {there} features, the detector gives {width}")

    def check(self, shape: tuple[int, ...], detector: str) -> None:
        """Whether images of this shape and this detector can be compared with it, as far as the file says.

        Raises:
            BadReference: they cannot.
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
    """Reads a reference. Nothing in the file is run.

    Raises:
        BadReference: no such file, something else, or statistics that cannot be.
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
    """Writes statistics as EDM's .npz, with the number of images, their shape and the sha256 of the detector beside."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        mu=moments.mean.numpy(),
        sigma=moments.covariance.numpy(),
        n=np.int64(moments.n or 0),
        shape=np.array(shape, np.int64),
        detector=np.array(detector),
    )
    write_whole(Path(path), lambda file: file.write(buffer.getvalue()))


def _npz(path: Path) -> tuple[dict[str, Moments], dict[str, Any]]:
    with zipfile.ZipFile(path) as archive:
        if max((member.file_size for member in archive.infolist()), default=0) > _LARGEST:
            raise ValueError("it holds an array of more than 1 GiB")
    with np.load(path, allow_pickle=False) as file:
        missing = {"mu", "sigma"} - set(file.files)
        if missing:
            raise ValueError(
                f"it has {', '.join(sorted(file.files)) or 'nothing'}, and no {' or '.join(sorted(missing))}"
            )
        n = int(file["n"]) if "n" in file.files else None
        facts: dict[str, Any] = {}
        if "shape" in file.files:
            facts["shape"] = tuple(file["shape"].tolist())
        if "detector" in file.files:
            facts["detector"] = str(file["detector"])
        return {"fid": _moments(file["mu"], file["sigma"], n)}, facts


def _moments(mu: Any, sigma: Any, n: int | None) -> Moments:
    for name, array in (("mu", mu), ("sigma", sigma)):
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            raise ValueError(f"{name} must be an array of floating-point numbers")
    mean, covariance = (torch.from_numpy(array.astype(np.float64)) for array in (mu, sigma))
    return Moments(mean, covariance, n)


# EDM2's: {"num_images": n, "fid": {"mu": ..., "sigma": ...}, "fd_dinov2": ...} --------------------------------------


def _pkl(path: Path) -> tuple[dict[str, Moments], dict[str, Any]]:
    data = read(io.BytesIO(path.read_bytes()), plain_arrays.NAMES)
    if type(data) is not dict:
        raise PickleError("it holds no table")
    n = data.get("num_images")
    n = n if type(n) is int else None
    found = {}
    for name, entry in data.items():
        if type(entry) is dict and {"mu", "sigma"} <= set(entry):
            found[str(name)] = _moments(_value(entry["mu"]), _value(entry["sigma"]), n)
    if not found:
        raise PickleError(f"it has {', '.join(map(repr, data))[:100] or 'nothing'}, and no entry with mu and sigma")
    return found, {}


def _value(entry: Any) -> Any:
    return entry.value() if isinstance(entry, PlainArray) else entry
