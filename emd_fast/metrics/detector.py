"""Detectors: networks from a user's file that compute features of images, such as EDM's Inception."""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emd_fast.io.code import CodeRefused
from emd_fast.metrics.images import rgb

_EXPECTED = "TorchScript, as inception-2015-12-05.pt"
_LARGEST = 2**34  # bytes; the largest published detectors have about 2^31
# SHA-256 of programs that run without being named. Published hash of inception-2015-12-05.pt of
# StyleGAN2-ADA: k-diffusion's evaluation.py pins it.
_KNOWN = {"f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"}


class DetectorError(ValueError):
    """A file is no detector, or its program fails. The message is one line that names the file."""


class Detector:
    """A detector from a TorchScript file with the interface of NVlabs' Inception.

    `forward(images, return_features=...)` takes uint8 images (n, 3, H, W). It returns features with
    return_features=True. Without it, it returns class probabilities if forward also takes
    `no_output_bias`.

    A TorchScript file is code: PyTorch's interpreter runs it, and operators of PyTorch can write
    files. It runs only if its SHA-256 is that of a published detector, or if the user names the
    file. A .pt2 of torch.export and NVlabs' .pkl are refused: reading them executes Python.

    Args:
        path: path of the file.
        device: where the detector runs.
        named: whether the user names the file. Pass False for a path that stands in a run folder,
            a recipe or another file.

    Raises:
        DetectorError: there is no such file, or it is of another kind.
        CodeRefused: the file is not named by the user, and no published detector.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu", *, named: bool = True) -> None:
        self.path, self.device = Path(path), torch.device(device)
        content = _content(self.path)
        self.sha256 = hashlib.sha256(content).hexdigest()
        if not named and self.sha256 not in _KNOWN:
            raise CodeRefused(
                f"this run names the detector {self.path}, a TorchScript program that is no published one (sha256 "
                f"{self.sha256}): give --detector {self.path} to allow it, if you trust that program"
            )
        self._network, arguments = _load(self.path, content, self.device)
        self._options: dict[str, Any] = {"return_features": True}
        self.has_classes = "no_output_bias" in arguments

    def features(self, images: Tensor) -> Tensor:
        """Features (n, D) of images (n, 1 or 3, H, W) uint8.

        Raises:
            DetectorError: the program fails, or returns another shape.
        """
        return self._run(images, self._options)

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (n, classes) without the last layer's bias, as the inception score uses.

        Raises:
            DetectorError: the program fails, or returns another shape.
            ValueError: the detector has no classes.
        """
        if not self.has_classes:
            raise ValueError(f"the detector {self.path} has no classes: its forward takes no no_output_bias")
        return self._run(images, {"no_output_bias": True})

    @torch.no_grad()
    def _run(self, images: Tensor, options: dict[str, Any]) -> Tensor:
        try:
            found = self._network(rgb(images).contiguous().to(self.device), **options)
        except (RuntimeError, TypeError, AssertionError) as error:
            raise DetectorError(
                f"the detector {self.path} fails on images {tuple(images.shape)}: {_last_line(error)}"
            ) from None
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise DetectorError(
                f"the detector {self.path} must return ({len(images)}, D) for {len(images)} images, got {shape}"
            )
        return found


def _content(path: Path) -> bytes:
    """Reads a file that looks like TorchScript, once: the bytes that are hashed are those that run."""
    if not path.is_file():
        raise DetectorError(f"there is no detector file {path}")
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            pickle = file.read(1) == b"\x80"
        if pickle:
            raise DetectorError(
                f"{path} is a pickle, a program of Python's that reading would run: refused; give the same network as "
                "TorchScript, inception-2015-12-05.pt"
            )
        raise DetectorError(f"{path} is no detector: it must be {_EXPECTED}")
    try:
        with zipfile.ZipFile(path) as archive:
            files = {name.rpartition("/")[2] for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DetectorError(f"cannot read the detector {path}: {_last_line(error)}") from None
    if "archive_format" in files or path.suffix == ".pt2":
        raise DetectorError(
            f"{path} is a program of torch.export, whose loader runs pickles: refused; save the network with "
            "torch.jit.script instead"
        )
    if "constants.pkl" not in files:
        raise DetectorError(f"{path} is an archive, but no program: a detector must be {_EXPECTED}")
    if path.stat().st_size > _LARGEST:
        raise DetectorError(f"{path} has more than {_LARGEST >> 30} GiB: no detector")
    return path.read_bytes()


def _load(path: Path, content: bytes, device: torch.device) -> tuple[Any, set[str]]:
    """Returns the program in a file's content, and the names of the arguments that it takes."""
    try:
        with warnings.catch_warnings():
            # Published detectors are TorchScript, which PyTorch deprecates.
            warnings.simplefilter("ignore", DeprecationWarning)
            script = torch.jit.load(io.BytesIO(content), map_location=device).eval()
        arguments = {argument.name for argument in script.forward.schema.arguments}
    except Exception as error:  # PyTorch's reader raises exceptions of many kinds
        raise DetectorError(f"cannot read the detector {path}: {_last_line(error)}") from None
    if "return_features" not in arguments:
        raise DetectorError(f"{path} is TorchScript, but its forward takes no return_features: no detector")
    return script, arguments


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
