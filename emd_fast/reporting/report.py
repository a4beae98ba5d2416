"""report.md of a run: tables of metrics, pictures, curves, cost and configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emd_fast.io.files import write_text
from emd_fast.io.reading import parse_json, parse_toml, read_bytes, read_text, reason
from emd_fast.io.signed import table_of
from emd_fast.reporting import journal, pictures, video

_ORDER = ("real", "teacher", "init", "generator")  # of columns and pictures; other names follow


def write(folder: str | os.PathLike[str], note: str | None = None) -> Path:
    """Writes report.md and curves.png into a run's folder, from the files in it.

    Args:
        folder: folder of a run. Read from it, if present: config.toml, metrics.json, log.jsonl,
            samples/*.png.
        note: a paragraph for the top, such as the reason why a run stopped early.

    Returns:
        The path of report.md. The report says so if there are no metrics or no curves.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: metrics.json is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder {folder}")
    config_text = _text(folder / "config.toml")
    config = parse_toml(config_text) if config_text else {}
    metrics = _metrics(folder / "metrics.json")
    task = config.get("task", "digits")

    parts = [f"# EM Distillation of {_TASKS.get(task, task)}"]
    parts += [f"**{note}**"] if note else []
    parts += _results(metrics, task)
    parts += _pictures(folder, _calls(config))
    parts += _curves(folder)
    parts += _cost(metrics)
    parts += ["## Configuration", f"```toml\n{config_text.strip()}\n```"] if config_text else []
    text = "\n\n".join(parts) + "\n"
    write_text(folder / "report.md", text)
    return folder / "report.md"


def write_stopped(folder: str | os.PathLike[str], reason: str) -> Path:
    """Writes the report of a run that ended early, with the reason at the top."""
    return write(folder, f"This run stopped before its end: {reason}")


_TASKS = {
    "digits": "8x8 digits",
    "fashion": "Fashion-MNIST",
    "gmm": "a two-dimensional mixture",
    "pretrained": "a pretrained teacher",
}
_CAPTIONS = {
    "real": "real",
    "teacher": "teacher (18-step Heun, 35 network calls)",
    "init": "generator before distillation",
    "generator": "distilled generator",
}
_LABELS = {
    "frechet": "Fréchet distance (lower is better)",
    "recall": "recall, k = 3 (higher)",
    "precision": "precision, k = 3 (higher)",
    "accuracy": "class accuracy (higher)",
    "recall_by_class": "recall by class (higher)",
    "inception_score": "inception score (higher)",
    "inception_score_std": "its standard deviation over 10 splits",
    "clip_score": "CLIP score (higher)",
    "modes": "modes found (higher)",
    "total_variation": "total variation of the mass (lower)",
    "mass": "mass by mode",
    "mean": "mean of all values",
    "std": "standard deviation of all values",
}
_FILES = ("detector", "reference", "compare_with")
_HIDDEN = ("seconds", "due", "best", *_FILES)  # shown elsewhere, or equal in every column
_ABOUT = {
    "digits": (
        "Features are the last hidden layer (64 numbers) of a small classifier trained on the train split of the real "
        "digits. Every set is compared with the held-out real digits, at the same number of images. The column "
        "*real* is a random part of the train split: the result of a perfect copy of the training data. The "
        "classifier was trained on these images, so its accuracy on them is not its accuracy on new digits. Fréchet "
        "distances depend on the features and on n: compare them only inside this table. Accuracy alone says little: "
        "a generator that makes one clean image for each class has the best."
    ),
    "fashion": (
        "Features are the last hidden layer (64 numbers) of a small classifier trained on the train split of the real "
        "images; `classifier_accuracy` in metrics.json is its accuracy on the test split. Every set is compared with "
        "the held-out images of the test split, at the same number of images. The column *real* is a random part of "
        "the train split: the result of a perfect copy of the training data. Recall by class counts the held-out "
        "images of each class that the set covers. The inception score is that of the classifier. The mass is that of "
        "the classes that it predicts. Fréchet distances depend on the features and on n: compare them only inside "
        "this table."
    ),
    "gmm": (
        "Every set is compared with as many fresh, exact samples of the mixture, on the coordinates themselves. The "
        "column *real* is another set of exact samples. A mode is found if at least a quarter of its due mass lies "
        "within 3 standard deviations of its mean."
    ),
    "pretrained": (
        "Mean and standard deviation are taken over all elements of 16 samples (latents, if the teacher has a VAE). "
        "They reveal a broken generator, but they do not measure quality: a pretrained teacher comes with no data to "
        "compare with. To measure quality, give `emd-fast evaluate` a detector and the statistics of the teacher's "
        "data, and look at the pictures."
    ),
}


def _results(metrics: Mapping[str, Any], task: str) -> list[str]:
    rows = {key: values for key, values in metrics.items() if isinstance(values, Mapping) and key not in _HIDDEN}
    if not rows:
        return ["There are no metrics: the run did not reach its evaluation."]
    names = sorted({name for values in rows.values() for name in values}, key=lambda name: (_rank(name), name))
    table = [["", *names]]
    for key in sorted(rows, key=lambda key: (list(_LABELS).index(key) if key in _LABELS else len(_LABELS), key)):
        table.append([_LABELS.get(key, key), *(_number(rows[key].get(name)) for name in names)])
        real = rows[key].get("real")
        if key == "frechet" and isinstance(real, (int, float)) and real > 0:
            ratios = {name: value / real for name, value in rows[key].items() if isinstance(value, (int, float))}
            table.append(["Fréchet distance over that of *real*", *(_number(ratios.get(name)) for name in names)])
    facts = ", ".join(f"{key} = {_number(metrics[key])}" for key in ("n", "seed", "seeds") if key in metrics)
    sentences = [f"Each set: {facts}."] if facts else []
    return ["## Results", _table(table), *sentences, *_provenance(metrics), _ABOUT.get(task, ""), *_best(metrics)]


def _provenance(metrics: Mapping[str, Any]) -> list[str]:
    """Lists the files that a detector's metrics depend on, and the warning that belongs to them."""
    named = {name: metrics[name] for name in _FILES if name in metrics}
    lines = [f"- {name.replace('_', ' ')}: `{file['file']}`, sha256 `{file['sha256']}`" for name, file in named.items()]
    warning = [f"**{metrics['warning']}.**"] if "warning" in metrics else []
    return (["\n".join(lines)] if lines else []) + warning


def _best(metrics: Mapping[str, Any]) -> list[str]:
    best = metrics.get("best")
    if not best:
        return []
    evaluated = f"These metrics are of the checkpoint of step {metrics.get('steps')}. " if "trained" in metrics else ""
    return [
        f"{evaluated}The best checkpoint of the training is that of step {best['step']}, with a Fréchet distance of "
        f"{_number(best['frechet'])}: `checkpoints/best`, which `--best` selects."
    ]


def _calls(config: Mapping[str, Any]) -> int:
    """Number of calls of the generator."""
    rungs = config.get("emd", {}).get("rungs", 1)
    return len(rungs) if isinstance(rungs, list) else rungs


def _caption(name: str, calls: int) -> str:
    generator, _, fewer = name.partition("_")
    if generator == "generator" and fewer.isdigit():
        name, calls = generator, int(fewer)
    made = f" ({calls} call{'s' if calls > 1 else ''})" if name in ("init", "generator") else ""
    return _CAPTIONS.get(name, name.replace("_", " ")) + made


def _pictures(folder: Path, calls: int) -> list[str]:
    paths = sorted((folder / "samples").glob("*.png"), key=lambda path: (_rank(path.stem), path.stem))
    if not paths:
        return []
    cells = [(_caption(path.stem, calls), f"![{path.stem}](samples/{path.name}){_video(path)}") for path in paths]
    pairs = [cells[i : i + 2] for i in range(0, len(cells), 2)]
    return [
        "## Samples",
        *(_table([list(column) for column in zip(*pair, strict=True)], align="---") for pair in pairs),
    ]


def _video(picture: Path) -> str:
    """A link to the video beside a picture, if there is one."""
    found = [path for path in (picture.with_suffix(ending) for ending in video.ENDINGS) if path.exists()]
    return f" [video](samples/{found[0].name})" if found else ""


def _curves(folder: Path) -> list[str]:
    try:
        pictures.curves(folder / "curves.png", journal.read(folder / "log.jsonl"))
    except ValueError:  # nothing was logged
        return []
    except ModuleNotFoundError as error:  # a missing matplotlib must not fail a finished run
        return ["## Training", f"There are no curves: {error}."]
    return ["## Training", "![losses, drift and z, gradient norms](curves.png)"]


def _cost(metrics: Mapping[str, Any]) -> list[str]:
    seconds = metrics.get("seconds")
    if not isinstance(seconds, Mapping) or not seconds:
        return []
    seconds = {name: value for name, value in seconds.items() if isinstance(value, (int, float))}
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


def _rank(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return " ".join(_number(item) for item in value)
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.3g}" if abs(value) < 1 or abs(value) >= 100 else f"{value:.2f}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(path: Path) -> str:
    return read_text(path) if path.exists() else ""


def _metrics(path: Path) -> dict[str, Any]:
    try:
        metrics = parse_json(_text(path) or "{}")
        if isinstance(metrics, dict) and "sha256" in metrics:
            metrics = table_of(read_bytes(path), indent=1)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, or not JSON: {reason(error)}") from None
    if not isinstance(metrics, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(metrics).__name__}")
    for name, value in metrics.items():
        if not _is_metric(name, value):
            raise ValueError(f"{path} has an entry {name[:100]!r} of another form")
    return metrics


def _is_metric(name: str, value: Any) -> bool:
    """Whether an entry has the form that an evaluation gives it."""
    if name in _FILES:
        return isinstance(value, dict) and {"file", "sha256"} <= value.keys()
    if name == "best":
        return isinstance(value, dict) and {"step", "frechet"} <= value.keys() and all(map(_is_plain, value.values()))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return name not in ("seconds", "best") and (isinstance(value, str) or _is_plain(value))


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(type(item) in (int, float) for item in value)
    return value is None or type(value) in (int, float)
