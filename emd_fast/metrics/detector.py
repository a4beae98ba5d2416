"""Detectors: networks from a user's file that compute features of images, such as EDM's Inception."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emd_fast.metrics.images import rgb

_EXPECTED = "TorchScript, as inception-2015-12-05.pt, or a .pt2 of torch.export"


class DetectorError(ValueError):
    """A file is no detector, or its program fails. The message is one line that names the file."""


class Detector:
    """A detector from a file, in one of two formats.

    - TorchScript, with the interface of NVlabs' Inception: `forward(images, return_features=...)` on
      uint8 images (n, 3, H, W). It returns features with return_features=True. Without it, it returns
      class probabilities if forward also takes `no_output_bias`.
    - A torch.export program (.pt2) that returns features of uint8 images (n, 3, H, W), with n dynamic.

    PyTorch's interpreter runs the program in the file. It contains no Python, but it is somebody's
    code all the same. NVlabs' .pkl is refused: reading this pickle would execute Python.

    Args:
        path: path of the file.
        device: where the detector runs.

    Raises:
        DetectorError: there is no such file, or it is of another kind.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.path, self.device = Path(path), torch.device(device)
        self._network, arguments = _load(self.path, self.device)
        self.sha256 = sha256_of(self.path)
        self._options: dict[str, Any] = {"return_features": True} if "return_features" in arguments else {}
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


def _load(path: Path, device: torch.device) -> tuple[Any, set[str]]:
    """Returns the callable in the file, and the names of the arguments that it takes."""
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
    with zipfile.ZipFile(path) as archive:
        files = {name.partition("/")[2] for name in archive.namelist()}
    try:
        if "archive_format" in files:
            program = torch.export.load(str(path)).module().to(device)
            return program, set()
        if "constants.pkl" in files:
            with warnings.catch_warnings():
                # Published detectors are TorchScript, which PyTorch deprecates.
                warnings.simplefilter("ignore", DeprecationWarning)
                script = torch.jit.load(str(path), map_location=device).eval()
            arguments = {argument.name for argument in script.forward.schema.arguments}
            if "return_features" not in arguments:
                raise DetectorError(f"{path} is TorchScript, but its forward takes no return_features: no detector")
            return script, arguments
    except DetectorError:
        raise
    except Exception as error:  # PyTorch's readers raise exceptions of many kinds
        raise DetectorError(f"cannot read the detector {path}: {_last_line(error)}") from None
    raise DetectorError(f"{path} is an archive, but no program: a detector must be {_EXPECTED}")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
