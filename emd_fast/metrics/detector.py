"""Detectors: networks in a file of the user's that make features of images, as EDM's Inception does."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emd_fast.metrics.images import rgb

_WANTED = "TorchScript, as inception-2015-12-05.pt, or a .pt2 of torch.export"


class DetectorError(ValueError):
    """A file that is no detector: one line that names it and what is wanted."""


class Detector:
    """A detector from a file.

    TorchScript: `forward(images, return_features=...)` on uint8 images (n, 3, H, W), as NVlabs' Inception has it:
    features with return_features=True; class probabilities without it where forward takes `no_output_bias` too. A
    program of torch.export (.pt2): features of uint8 images (n, 3, H, W), with n dynamic. Either is a program, which
    PyTorch's interpreter runs; it is no Python, but it is somebody's program all the same.

    NVlabs' .pkl is a pickle, which would have to be executed; this library never does.

    Args:
        path: of the file. device: where it is used.

    Raises:
        DetectorError: no such file, or something else.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cpu") -> None:
        self.path, self.device = Path(path), torch.device(device)
        self._network, arguments = _load(self.path, self.device)
        self.sha256 = sha256_of(self.path)
        self._options: dict[str, Any] = {"return_features": True} if "return_features" in arguments else {}
        self.has_classes = "no_output_bias" in arguments

    def features(self, images: Tensor) -> Tensor:
        """(n, D) of images (n, 1 or 3, H, W) uint8.

        Raises:
            DetectorError: the program fails, or returns something else.
        """
        return self._run(images, self._options)

    def probabilities(self, images: Tensor) -> Tensor:
        """(n, classes), without the bias of the last layer, as the inception score has always been computed.

        Raises:
            DetectorError: the program fails, or returns something else. ValueError: it has no classes.
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
    """What is called on images, and the names of the arguments that it takes."""
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
        raise DetectorError(f"{path} is no detector: it must be {_WANTED}")
    with zipfile.ZipFile(path) as archive:
        files = {name.partition("/")[2] for name in archive.namelist()}
    try:
        if "archive_format" in files:
            program = torch.export.load(str(path)).module().to(device)
            return program, set()
        if "constants.pkl" in files:
            with warnings.catch_warnings():
                # TorchScript is what the detectors of the field are in, whatever follows it.
                warnings.simplefilter("ignore", DeprecationWarning)
                script = torch.jit.load(str(path), map_location=device).eval()
            arguments = {argument.name for argument in script.forward.schema.arguments}
            if "return_features" not in arguments:
                raise DetectorError(f"{path} is TorchScript, but its forward takes no return_features: no detector")
            return script, arguments
    except DetectorError:
        raise
    except Exception as error:  # readers of PyTorch raise whatever they meet
        raise DetectorError(f"cannot read the detector {path}: {_last_line(error)}") from None
    raise DetectorError(f"{path} is an archive, but no program: a detector must be {_WANTED}")


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
