"""What a run leaves for people: sample grids, scatter plots, curves, and report.md. Needs Pillow and matplotlib."""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from emd_fast.io.files import write_whole
from emd_fast.metrics.images import to_uint8
from emd_fast.reporting import journal

if TYPE_CHECKING:
    from PIL.Image import Image

_FIRST = ("real", "teacher", "init", "student")  # the order of columns and pictures; other names follow
_CELL = 32  # pixels: what an image smaller than that is enlarged to, at least
_GAP, _BACKGROUND = 2, 255
_COLOURS = ("#1f5fa8", "#d9722b", "#3a8f5c", "#8a4fa3")

# Pictures ---------------------------------------------------------------------------------------------------------


def grid(images: Tensor, columns: int | None = None, scale: int | None = None) -> Image:
    """Images in rows, left to right, on white.

    Args:
        images: (N, C, H, W), C = 1 or 3, in [-1, 1]; values outside are clipped. N at least 1.
        columns: images in a row; about the square root of N when None.
        scale: pixels for one, by repetition; enough for 32 a side when None.

    Raises:
        ValueError: another shape, no image, values that are not finite, or columns or scale below 1.
    """
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
    return _need("PIL.Image").fromarray(pixels)


def save_grid(
    path: str | os.PathLike[str], images: Tensor, columns: int | None = None, scale: int | None = None
) -> None:
    """Writes `grid(images, columns, scale)` to a PNG file, and makes its folder."""
    picture = grid(images, columns, scale)
    _write(path, lambda file: picture.save(file, format="PNG"))


def save_each(
    folder: str | os.PathLike[str], images: Callable[[int, int], Tensor], n: int, first: int = 0, batch: int = 64
) -> None:
    """Writes n images as PNG files, 000000.png and so on, as EDM's generate.py does and its fid.py takes them.

    Args:
        images: (index, n) -> (n, 1 or 3, H, W) in [-1, 1]; index from 0 on. first: the number of the first file.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    folder = Path(folder)
    for index in range(0, n, batch):
        for number, image in enumerate(to_uint8(images(index, min(batch, n - index))).cpu(), first + index):
            pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
            picture = _need("PIL.Image").fromarray(pixels.contiguous().numpy())
            _write(folder / f"{number:06d}.png", functools.partial(picture.save, format="PNG"))


def scatter(path: str | os.PathLike[str], samples: Mapping[str, Tensor]) -> None:
    """One panel for each set of points, all on the same axes, to a PNG file.

    Args:
        samples: name -> (n, 2); points that are not finite are left out and counted in the panel's title.

    Raises:
        ValueError: no set, or one of another shape.
    """
    if not samples:
        raise ValueError("samples must hold at least one set of points")
    points = {}
    for name, values in samples.items():
        if values.dim() != 2 or values.shape[1] != 2:
            raise ValueError(f"samples must have shape (n, 2): {name!r} has {tuple(values.shape)}")
        points[name] = values.detach().cpu().double()
    kept = {name: values[values.isfinite().all(1)] for name, values in points.items()}
    # The first set sets the frame: stray points of a bad generator must not shrink everything else to a dot.
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
    ("student loss", "linear", (("student_loss", "student"),)),
    ("root mean square", "log", (("drift_rms", "drift"), ("z_rms", "z"))),
    ("gradient norm", "log", (("generator_grad_norm", "generator"), ("student_grad_norm", "student"))),
)


def curves(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Losses, drift and z, and gradient norms over the steps, to a PNG file: thin as measured, thick a running mean.

    Args:
        rows: of log.jsonl: "step" and any of generator_loss, student_loss, drift_rms, z_rms, generator_grad_norm and
            student_grad_norm. Other rows and keys are passed over; values that are not finite leave a gap.

    Raises:
        ValueError: no row has any of these.
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
    # JSON has no NaN: a writer may have put null there.
    found = [(float(row["step"]), row[key]) for row in rows if "step" in row and key in row]
    return [step for step, _ in found], [math.nan if value is None else float(value) for _, value in found]


def _running_mean(values: Sequence[float]) -> list[float]:
    """Over a tenth of the curve, ending at each point; a value that is not finite is passed over."""
    window = max(1, len(values) // 10)
    means = []
    for i in range(len(values)):
        near = [value for value in values[max(0, i + 1 - window) : i + 1] if math.isfinite(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


# report.md --------------------------------------------------------------------------------------------------------


def write(folder: str | os.PathLike[str], note: str | None = None) -> Path:
    """Writes report.md and curves.png into a run's folder, from what lies there.

    Args:
        folder: of a run. Read from it, where present: config.toml, metrics.json, log.jsonl, samples/*.png.
        note: a paragraph for the top, such as why a run stopped early.

    Returns:
        The path of report.md. What is missing in the folder is said there.

    Raises:
        FileNotFoundError: no such folder. ValueError: metrics.json is not what a run writes.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    config_text = _text(folder / "config.toml")
    config = tomllib.loads(config_text) if config_text else {}
    metrics = _metrics(folder / "metrics.json")
    task = config.get("task", "digits")

    parts = [f"# EM Distillation of {_TASKS.get(task, task)}"]
    parts += [f"**{note}**"] if note else []
    parts += _results(metrics, task)
    parts += _pictures(folder)
    parts += _curves(folder)
    parts += _cost(metrics)
    parts += ["## Configuration", f"```toml\n{config_text.strip()}\n```"] if config_text else []
    text = "\n\n".join(parts) + "\n"
    _write(folder / "report.md", lambda file: file.write(text.encode()))
    return folder / "report.md"


def write_stopped(folder: str | os.PathLike[str], reason: str) -> Path:
    """`write` for a run that ended early, with the reason at the top."""
    return write(folder, f"This run stopped before its end: {reason}")


_TASKS = {"digits": "8x8 digits", "gmm": "a two-dimensional mixture", "pretrained": "a pretrained teacher"}
_CAPTIONS = {
    "real": "real",
    "teacher": "teacher (18-step Heun, 35 network calls)",
    "init": "generator before distillation (1 call)",
    "student": "distilled generator (1 call)",
}
_LABELS = {
    "frechet": "Fréchet distance (lower is better)",
    "recall": "recall, k = 3 (higher)",
    "precision": "precision, k = 3 (higher)",
    "accuracy": "class accuracy (higher)",
    "inception_score": "inception score (higher)",
    "inception_score_std": "its standard deviation over 10 parts",
    "clip_score": "CLIP score (higher)",
    "modes": "modes found (higher)",
    "total_variation": "total variation of the mass (lower)",
    "mass": "mass by mode",
    "mean": "mean of all values",
    "std": "standard deviation of all values",
}
_FILES = ("detector", "reference", "compare_with")
_HIDDEN = ("seconds", "due", "best", *_FILES)  # in a table or sentence of their own, or the same in every column
_ABOUT = {
    "digits": (
        "Features are the last hidden layer (64 numbers) of a small classifier trained on the train split of the real "
        "digits. Every set is compared with the held-out real digits, at the same number of images. The column "
        "*real* is a random part of the train split: it says what a perfect copy of the training data would get. The "
        "classifier has seen those very images, so its accuracy there is no accuracy on new digits. Fréchet distances "
        "depend on the features and on n: they compare with nothing outside this table. Accuracy alone says little: a "
        "generator that makes one clean image for each class has the best."
    ),
    "gmm": (
        "Every set is compared with as many fresh, exact samples of the mixture, on the coordinates themselves. The "
        "column *real* is another set of exact samples. A mode is found when at least a quarter of its due mass lies "
        "within 3 standard deviations of its mean."
    ),
    "pretrained": (
        "Mean and standard deviation are of all elements of 16 samples (latents, where the teacher has a VAE). A "
        "teacher that was there already brings no data to compare with: they find a generator that has broken; they do "
        "not say how good one is. For that, look at the pictures, and give `emd-fast evaluate` a detector and the "
        "statistics of the teacher's data."
    ),
}


def _results(metrics: Mapping[str, Any], task: str) -> list[str]:
    rows = {key: values for key, values in metrics.items() if isinstance(values, Mapping) and key not in _HIDDEN}
    if not rows:
        return ["There are no metrics: the run did not reach its evaluation."]
    names = sorted({name for values in rows.values() for name in values}, key=lambda name: (_place(name), name))
    table = [["", *names]]
    for key in sorted(rows, key=lambda key: (list(_LABELS).index(key) if key in _LABELS else len(_LABELS), key)):
        table.append([_LABELS.get(key, key), *(_number(rows[key].get(name)) for name in names)])
        real = rows[key].get("real")
        if key == "frechet" and isinstance(real, (int, float)) and real > 0:
            ratios = {name: rows[key][name] / real for name in rows[key] if rows[key][name] is not None}
            table.append(["Fréchet distance over that of *real*", *(_number(ratios.get(name)) for name in names)])
    said = ", ".join(f"{key} = {_number(metrics[key])}" for key in ("n", "seed", "seeds") if key in metrics)
    sentences = [f"Each set: {said}."] if said else []
    return ["## Results", _table(table), *sentences, *_judged_by(metrics), _ABOUT.get(task, ""), *_best(metrics)]


def _judged_by(metrics: Mapping[str, Any]) -> list[str]:
    """The files that a detector's figures depend on."""
    named = {name: metrics[name] for name in _FILES if name in metrics}
    lines = [f"- {name.replace('_', ' ')}: `{file['file']}`, sha256 `{file['sha256']}`" for name, file in named.items()]
    warning = [f"**{metrics['warning']}.**"] if "warning" in metrics else []
    return (["\n".join(lines)] if lines else []) + warning


def _best(metrics: Mapping[str, Any]) -> list[str]:
    best = metrics.get("best")
    if not best:
        return []
    judged = f"Judged here is the checkpoint of step {metrics['steps']}. " if "trained" in metrics else ""
    return [
        f"{judged}The best checkpoint while it trained is that of step {best['step']}, with a Fréchet distance of "
        f"{_number(best['frechet'])}: `checkpoints/best`, which `--best` chooses."
    ]


def _pictures(folder: Path) -> list[str]:
    paths = sorted((folder / "samples").glob("*.png"), key=lambda path: (_place(path.stem), path.stem))
    if not paths:
        return []
    cells = [
        (_CAPTIONS.get(path.stem, path.stem.replace("_", " ")), f"![{path.stem}](samples/{path.name})")
        for path in paths
    ]
    pairs = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    return [
        "## Samples",
        *(_table([list(column) for column in zip(*pair, strict=True)], align="---") for pair in pairs),
    ]


def _curves(folder: Path) -> list[str]:
    try:
        curves(folder / "curves.png", journal.read(folder / "log.jsonl"))
    except ValueError:  # nothing was logged
        return []
    except ModuleNotFoundError as error:  # a run must not fail at its end because nobody can draw
        return ["## Training", f"There are no curves: {error}."]
    return ["## Training", "![losses, drift and z, gradient norms](curves.png)"]


def _cost(metrics: Mapping[str, Any]) -> list[str]:
    seconds = metrics.get("seconds")
    if not isinstance(seconds, Mapping) or not seconds:
        return []
    phases = {name: value for name, value in seconds.items() if name != "total"}
    total = seconds.get("total", sum(phases.values()))
    rows = [
        ["phase", "seconds"],
        *([name, f"{value:.1f}"] for name, value in phases.items()),
        ["total", f"{total:.1f}"],
    ]
    return ["## Cost", _table(rows)]


def _table(rows: Sequence[Sequence[str]], align: str = "---:") -> str:
    head, *body = rows
    rule = ["---"] + [align] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def _place(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return " ".join(_number(item) for item in value)
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.3g}" if abs(value) < 1 or abs(value) >= 100 else f"{value:.2f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


# Files ------------------------------------------------------------------------------------------------------------


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(_text(path) or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(metrics, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(metrics).__name__}")
    return metrics


def _write(path: str | os.PathLike[str], fill: Callable[[BinaryIO], Any]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, fill)


def _need(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures and reports need Pillow and matplotlib: pip install pillow matplotlib", name=error.name
        ) from error


def _figure(width: float, height: float) -> Any:
    # Not pyplot: it would choose a window system for the whole process. A bare figure draws with Agg.
    return _need("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
