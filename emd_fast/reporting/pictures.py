"""Pictures of a run: image grids, single images, scatter plots and training curves.

Needs Pillow and matplotlib, which are imported at the first picture.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from emd_fast.io.files import write_atomic
from emd_fast.metrics.images import to_uint8
from emd_fast.reporting import video

if TYPE_CHECKING:
    from PIL.Image import Image

_CELL = 32  # pixels: smaller images are enlarged to at least this side
_FRAMES = 8  # of a video that are shown
_GAP, _BACKGROUND = 2, 255
_COLOURS = ("#1f5fa8", "#d9722b", "#3a8f5c", "#8a4fa3")


def grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> Image:
    """Arranges images in rows on white, from left to right.

    Args:
        images: (N, 1 or 3, H, W) in [-1, 1], N at least 1; values outside are clipped. Of videos
            (N, 1 or 3, F, H, W) each is a row of at most 8 frames.
        columns: images per row; about the square root of N when None.
        scale: integer factor of enlargement by pixel repetition. None picks one that gives a side
            of at least 32 pixels.

    Raises:
        ValueError: another shape, no image, values that are not finite, or columns or scale below
            1.
    """
    if images.dim() == 5 and images.numel():
        shown = torch.linspace(0, images.shape[2] - 1, min(images.shape[2], _FRAMES)).round().long()
        columns = len(shown) if columns is None else columns
        images = images.detach().cpu()[:, :, shown].transpose(1, 2).flatten(0, 1)
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images must have shape (N, 1 or 3, H, W) and not be empty, got {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("images must be finite: they hold NaN or infinite values")
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    scale = max(1, math.ceil(_CELL / max(height, width))) if scale is None else scale
    for name, value in (("columns", columns), ("scale", scale)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    columns, rows = min(columns, n), math.ceil(n / min(columns, n))

    bytes_NCHW = to_uint8(images.detach().cpu())
    enlarged = bytes_NCHW.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    step_y, step_x = height * scale + _GAP, width * scale + _GAP
    canvas = torch.full((channels, rows * step_y + _GAP, columns * step_x + _GAP), _BACKGROUND, dtype=torch.uint8)
    for i, image in enumerate(enlarged):
        top, left = _GAP + i // columns * step_y, _GAP + i % columns * step_x
        canvas[:, top : top + height * scale, left : left + width * scale] = image
    pixels = canvas.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
    return _import("PIL.Image").fromarray(pixels)


def save_grid(
    path: str | os.PathLike[str], images: Tensor, columns: int | None = None, scale: int | None = None
) -> None:
    """Writes `grid(images, columns, scale)` to a PNG file, and creates its folder."""
    picture = grid(images, columns, scale)
    _write(path, lambda file: picture.save(file, format="PNG"))


def save_each(
    folder: str | os.PathLike[str], images: Callable[[int, int], Tensor], n: int, first: int = 0, batch: int = 64
) -> None:
    """Writes n images as PNG files 000000.png, 000001.png, ..., the layout that EDM's fid.py reads.

    Videos become MP4 files, or GIF where PyAV is not installed.

    Args:
        folder: where the files go; created if missing.
        images: (index, n) -> images (n, 1 or 3, H, W) or videos (n, 1 or 3, F, H, W) in [-1, 1]; index
            starts at 0.
        n: number of images.
        first: number of the first file.
        batch: images per call of `images`.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    folder = Path(folder)
    for index in range(0, n, batch):
        made = images(index, min(batch, n - index))
        if made.dim() == 5:
            kind = video.ending()
            for number, frames in enumerate(made.transpose(1, 2), first + index):
                _write(
                    folder / f"{number:06d}{kind}", functools.partial(video.encode, frames=to_uint8(frames), kind=kind)
                )
            continue
        for number, image in enumerate(to_uint8(made).cpu(), first + index):
            _write(folder / f"{number:06d}.png", functools.partial(_picture(image).save, format="PNG"))


def save_video(path: str | os.PathLike[str], videos: Tensor) -> None:
    """Writes videos side by side, in the arrangement of `grid`, to an MP4 or GIF file, and creates its folder.

    Args:
        path: ends in .mp4 or .gif.
        videos: (N, 1 or 3, F, H, W) in [-1, 1], N and F at least 1; values outside are clipped.

    Raises:
        ValueError: another shape, no video, or values that are not finite.
        ModuleNotFoundError: an .mp4 without PyAV.
    """
    if videos.dim() != 5 or not videos.numel():
        raise ValueError(f"videos must have shape (N, 1 or 3, F, H, W) and not be empty, got {tuple(videos.shape)}")
    frames = torch.stack([torch.from_numpy(np.array(grid(images))) for images in videos.unbind(2)]).permute(0, 3, 1, 2)
    _write(path, functools.partial(video.encode, frames=frames, kind=Path(path).suffix))


def _picture(image: Tensor) -> Any:
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    return _import("PIL.Image").fromarray(pixels.contiguous().numpy())


def scatter(path: str | os.PathLike[str], samples: Mapping[str, Tensor]) -> None:
    """Draws sets of points side by side, with equal axes, into a PNG file.

    Args:
        path: path of the file; its folder is created if missing.
        samples: name -> (n, 2). The first set determines the limits of the axes. A panel's title
            counts the points that are outside the limits or not finite.

    Raises:
        ValueError: no set, or a set of another shape.
    """
    if not samples:
        raise ValueError("samples must hold at least one set of points")
    points = {}
    for name, values in samples.items():
        if values.dim() != 2 or values.shape[1] != 2:
            raise ValueError(f"samples must have shape (n, 2): {name!r} has {tuple(values.shape)}")
        points[name] = values.detach().cpu().double()
    kept = {name: values[values.isfinite().all(1)] for name, values in points.items()}
    # Limits from the first set: outliers of a bad generator must not shrink everything else to a dot.
    first = next(iter(kept.values()))
    reach = 1.25 * first.abs().max().item() if first.numel() else 1.0

    figure = _figure(3.2 * len(points), 3.4)
    for axes, (name, values) in zip(figure.subplots(1, len(points), squeeze=False)[0], kept.items(), strict=True):
        axes.scatter(values[:, 0], values[:, 1], s=3, alpha=0.35, linewidths=0, color=_COLOURS[0])
        hidden = len(points[name]) - int((values.abs() <= reach).all(1).sum())
        axes.set_title(name + (f" ({hidden} outside)" if hidden else ""), fontsize=11)
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=8)
    _write(path, lambda file: figure.savefig(file, format="png", dpi=120))


_PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("generator loss", "log", (("generator_loss", "generator"),)),
    ("fake-score loss", "linear", (("fake_score_loss", "fake score"),)),
    ("root mean square", "log", (("drift_rms", "drift"), ("z_rms", "z"))),
    ("gradient norm", "log", (("generator_grad_norm", "generator"), ("fake_score_grad_norm", "fake score"))),
)


def curves(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Draws losses, the RMS of drift and z, and gradient norms over the steps into a PNG file.

    Thin lines are logged values, thick lines running means.

    Args:
        path: path of the file; its folder is created if missing.
        rows: rows of log.jsonl, with "step" and any of generator_loss, fake_score_loss, drift_rms,
            z_rms, generator_grad_norm, fake_score_grad_norm. Other rows and keys are ignored.
            Values that are not finite leave a gap.

    Raises:
        ValueError: no row has a step and one of these keys.
    """
    series = {key: _series(rows := list(rows), key) for _, _, lines in _PANELS for key, _ in lines}
    panels = [panel for panel in _PANELS if any(series[key][0] for key, _ in panel[2])]
    if not panels:
        raise ValueError("there is nothing to plot: no row has a step and one of " + ", ".join(series))
    columns = min(2, len(panels))
    figure = _figure(4.5 * columns, 2.8 * math.ceil(len(panels) / columns))
    every = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).flat
    for axes in list(every)[len(panels) :]:
        axes.remove()
    for axes, (title, scale, lines) in zip(figure.axes, panels, strict=True):
        for colour, (key, label) in zip(_COLOURS, lines, strict=False):
            steps, values = series[key]
            axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _running_mean(values), color=colour, linewidth=1.6, label=label)
        positive = any(value > 0 for key, _ in lines for value in series[key][1])
        axes.set_yscale(scale if positive else "linear")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("step", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.5)
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
    _write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    # JSON has no NaN: some writers store null instead.
    found = [(float(row["step"]), row[key]) for row in rows if "step" in row and key in row]
    return [step for step, _ in found], [math.nan if value is None else float(value) for _, value in found]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the finite values in a window of a tenth of the curve that ends at each point."""
    window = max(1, len(values) // 10)
    means = []
    for i in range(len(values)):
        near = [value for value in values[max(0, i + 1 - window) : i + 1] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _write(path: str | os.PathLike[str], fill: Callable[[BinaryIO], Any]) -> None:
    path = Path(path)
    path.parent.mkdir(exist_ok=True)  # without those above: a run folder that was moved is not made again
    write_atomic(path, fill)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures and reports need Pillow and matplotlib: pip install pillow matplotlib", name=error.name
        ) from error


def _figure(width: float, height: float) -> Any:
    # A bare figure draws with Agg. pyplot would choose a GUI backend for the whole process.
    return _import("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
