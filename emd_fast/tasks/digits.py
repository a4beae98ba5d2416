"""The task "digits": distils a small UNet trained here, and evaluates it on held-out images."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast import distributed, ops
from emd_fast.config import ConfigError, RunConfig, TeacherConfig, from_dict, to_dict
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.sampler import heun
from emd_fast.noise import Noise, NoiseStream
from emd_fast.reporting import pictures
from emd_fast.tasks import OnStep, digits_data, digits_teacher
from emd_fast.tasks.digits_metrics import DigitFeatures, digits_metrics
from emd_fast.train import checkpoint, run_checkpoints
from emd_fast.train.rungs import by_calls
from emd_fast.train.trainer import EMDTrainer

_PREVIEWS = 100  # digits in a picture, ten of each class


class Digits:
    prompts = None

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def make_teacher(self, folder: Path, on_step: OnStep | None) -> Denoiser:
        path = folder / "teacher"
        teacher = self._load_or_train(path, on_step)
        teacher.source = str(path.resolve())
        return teacher

    def _load_or_train(self, path: Path, on_step: OnStep | None) -> Denoiser:
        config = self.config.teacher
        if run_checkpoints.exists(path):
            return _read_teacher(path, config)
        callback = None if on_step is None else lambda step, loss: on_step(step, config.steps, loss)
        teacher = digits_teacher.train(config, callback)
        checkpoint.save(path, {"config": to_dict(config), "teacher": teacher.state_dict()})
        return teacher

    def untrained_teacher(self) -> Denoiser:
        with torch.device("meta"):
            return digits_teacher.denoiser(digits_teacher.network(self.config.teacher))

    def make_networks(self) -> tuple[nn.Module | None, Denoiser | None]:
        return None, None

    def open_references(self) -> None:
        pass

    def basis(self) -> dict[str, Any]:
        return {}

    def interim_metrics(self, trainer: EMDTrainer) -> dict[str, float]:
        labels, cond = _held_out(trainer)
        metrics = digits_metrics(
            {"generator": (trainer.generate(len(labels), cond), cond)}, _features(), trainer.config.seed
        )
        names = ("frechet", "recall", "precision", "accuracy")
        return {name: metrics[name]["generator"] for name in names if "generator" in metrics[name]}

    def evaluate(self, trainer: EMDTrainer, untrained: EMDTrainer, folder: Path) -> dict[str, Any]:
        images = digits_data.load("test")[0]
        labels, cond = _held_out(trainer)
        z = ops.normal((len(labels), *digits_data.SHAPE), Noise(trainer.config.seed), stream=NoiseStream.SHOWN)
        samples = {
            "teacher": heun(trainer.teacher, z, cond),
            "init": untrained.generate(len(labels), cond, ema=False),
            **by_calls(trainer, len(labels), cond),
        }
        # An unconditional generator has no class to match, so its sets get no accuracy.
        with_labels = {name: (x, cond) for name, x in samples.items()}
        metrics = digits_metrics(with_labels, _features(), seed=trainer.config.seed)
        rows = _ten_of_each(labels)

        def draw() -> None:
            for name, x in {"real": images, **samples}.items():
                pictures.save_grid(folder / "samples" / f"{name}.png", x[rows], columns=10)

        distributed.on_main(draw)
        return metrics


def _read_teacher(path: Path, config: TeacherConfig) -> Denoiser:
    remedy = "remove it to train the teacher again"
    state = checkpoint.load(path, remedy=remedy)
    teacher = digits_teacher.denoiser(digits_teacher.network(config))
    weights: Any = state.get("teacher")
    if _forms(weights) != _forms(teacher.state_dict()) or not _is_of(state.get("config"), config):
        raise checkpoint.CheckpointError(f"{path} was trained with another [teacher] configuration; {remedy}")
    teacher.load_state_dict(weights)
    return teacher.eval()


def _forms(tensors: Any) -> dict[str, Any]:
    """Shape and dtype of each tensor; none where there are no tensors."""
    items = tensors.items() if isinstance(tensors, dict) else ()
    return {name: (value.shape, value.dtype) for name, value in items if isinstance(value, Tensor)}


def _is_of(saved: Any, config: TeacherConfig) -> bool:
    try:
        return isinstance(saved, dict) and from_dict(TeacherConfig, saved) == config
    except (ConfigError, TypeError):
        return False


def _held_out(trainer: EMDTrainer) -> tuple[Tensor, Tensor | None]:
    """Labels of the held-out images; also as conditions, or None if the generator has no classes."""
    labels = digits_data.load("test")[1]
    return labels, labels if trainer.config.num_classes else None


@functools.cache
def _features() -> DigitFeatures:
    return DigitFeatures()


def _ten_of_each(labels: Tensor) -> Tensor:
    """Indices of the first ten images of each class, for a picture with one class per row."""
    each = _PREVIEWS // digits_data.CLASSES
    return torch.cat([(labels == digit).nonzero()[:each, 0] for digit in range(digits_data.CLASSES)])
