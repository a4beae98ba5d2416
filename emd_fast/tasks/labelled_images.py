"""What the tasks "digits" and "fashion" share: labelled images, and a small UNet trained on them."""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast import distributed, ops
from emd_fast.config import ConfigError, RunConfig, TeacherConfig, from_dict, to_dict
from emd_fast.diffusion.denoiser import Condition, Denoiser
from emd_fast.diffusion.sampler import heun
from emd_fast.noise import Noise, NoiseStream
from emd_fast.reporting import pictures
from emd_fast.tasks import OnStep, image_teacher
from emd_fast.tasks.image_data import ImageData
from emd_fast.tasks.image_metrics import METRICS, LabelledSet
from emd_fast.train import checkpoint, run_checkpoints
from emd_fast.train.rungs import by_calls
from emd_fast.train.trainer import EMDTrainer

_PREVIEWS = 100  # images in a picture, as many of each class
_CHUNK = 1000  # images in a pass


class LabelledImages(abc.ABC):
    """A task whose teacher is trained here, and whose metrics compare with held-out images."""

    prompts = None

    def __init__(self, config: RunConfig, data: ImageData) -> None:
        self.config, self.data = config, data
        self._opened: dict[str, Any] | None = None  # the images of the references that were opened
        self._trained_on: dict[str, Any] | None = None  # that of the teacher

    @property
    def device(self) -> torch.device:
        """Where the networks run: on the CPU, which is enough for small images."""
        return torch.device("cpu")

    @abc.abstractmethod
    def metrics(self, samples: dict[str, LabelledSet], seed: int) -> dict[str, Any]:
        """Compares sets of images with held-out ones, as metric -> set name -> value."""

    @abc.abstractmethod
    def labels(self) -> Tensor:
        """Labels (N,) of the held-out images that the sets are compared with."""

    def real(self) -> Tensor:
        """Held-out images with these labels, for a picture."""
        return self.data.load("test")[0]

    def make_teacher(self, folder: Path, on_step: OnStep | None) -> Denoiser:
        path = folder / "teacher"
        teacher = self._load_or_train(path, on_step)
        teacher.source = str(path.resolve())
        return teacher

    def _load_or_train(self, path: Path, on_step: OnStep | None) -> Denoiser:
        config = self.config.teacher
        if run_checkpoints.exists(path):
            teacher, self._trained_on = read_teacher(path, config, self.data)
            self.check_images(self._opened)
            return teacher.to(self.device)
        callback = None if on_step is None else lambda step, loss: on_step(step, config.steps, loss)
        teacher = image_teacher.train(config, self.data, callback, device=self.device)
        self._trained_on = self.images()
        state = {"config": to_dict(config), "teacher": teacher.state_dict(), "basis": self._trained_on}
        checkpoint.save(path, state)
        return teacher

    def images(self) -> dict[str, Any]:
        """Returns what identifies the images, as plain values. A teacher keeps it."""
        return {}

    def check_images(self, opened: dict[str, Any] | None) -> None:
        """Remembers the images of the references, and compares them with those that the teacher was trained on.

        Raises:
            CheckpointError: other images.
        """
        self._opened = opened
        if opened is not None and self._trained_on is not None and opened != self._trained_on:
            raise checkpoint.CheckpointError(
                "the teacher was trained on other images: give their folder as --data, or choose another --out"
            )

    def untrained_teacher(self) -> Denoiser:
        with torch.device("meta"):
            return image_teacher.untrained(self.config.teacher, self.data)

    def make_networks(self) -> tuple[nn.Module | None, Denoiser | None]:
        return None, None

    def open_references(self) -> None:
        """Reads nothing, unless a task says otherwise."""
        return

    def basis(self) -> dict[str, Any]:
        return {}

    def interim_metrics(self, trainer: EMDTrainer) -> dict[str, float]:
        cond = self._conditions(trainer)
        images = self._in_chunks(lambda first, n, cond: trainer.generate(n, cond, first_sample=first), cond)
        metrics = self.metrics({"generator": (images, cond)}, trainer.config.seed)
        return {name: metrics[name]["generator"] for name in METRICS if "generator" in metrics[name]}

    def evaluate(self, trainer: EMDTrainer, untrained: EMDTrainer, folder: Path) -> dict[str, Any]:
        cond = self._conditions(trainer)
        samples = {
            "teacher": self.of_teacher(trainer, cond),
            "init": self._in_chunks(
                lambda first, n, cond: untrained.generate(n, cond, ema=False, first_sample=first), cond
            ),
            **self._of_generator(trainer, cond),
        }
        # An unconditional generator has no class to match, so its sets get no accuracy.
        metrics = self.metrics({name: (x, cond) for name, x in samples.items()}, trainer.config.seed)
        rows = _of_each(self.labels(), self.data.classes)

        def draw() -> None:
            for name, x in {"real": self.real(), **samples}.items():
                pictures.save_grid(folder / "samples" / f"{name}.png", x[rows], columns=_PREVIEWS // self.data.classes)

        distributed.on_main(draw)
        return metrics

    def of_teacher(self, trainer: EMDTrainer, cond: Tensor | None) -> Tensor:
        """Samples of the teacher, 18 Heun steps each."""
        noise = Noise(trainer.config.seed, device=trainer.device)
        z = ops.normal((len(self.labels()), *self.data.shape), noise, stream=NoiseStream.SHOWN)
        guidance = trainer.config.guidance
        return self._in_chunks(
            lambda first, n, cond: heun(trainer.teacher, z[first : first + n], cond, guidance=guidance), cond
        )

    def _of_generator(self, trainer: EMDTrainer, cond: Tensor | None) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for first, n, part in self._chunks(cond):
            for name, x in by_calls(trainer, n, part, first).items():
                parts.setdefault(name, []).append(x)
        return {name: torch.cat(each) for name, each in parts.items()}

    def _in_chunks(self, sample: Callable[[int, int, Condition], Tensor], cond: Tensor | None) -> Tensor:
        return torch.cat([sample(first, n, part) for first, n, part in self._chunks(cond)])

    def _chunks(self, cond: Tensor | None) -> list[tuple[int, int, Tensor | None]]:
        """First sample, number and conditions of each pass."""
        total = len(self.labels())
        starts = range(0, total, _CHUNK)
        return [(i, min(_CHUNK, total - i), None if cond is None else cond[i : i + _CHUNK]) for i in starts]

    def _conditions(self, trainer: EMDTrainer) -> Tensor | None:
        """Labels of the held-out images as conditions, or None if the generator has no classes."""
        return self.labels().to(trainer.device) if trainer.config.num_classes else None


def read_teacher(path: Path, config: TeacherConfig, data: ImageData) -> tuple[Denoiser, dict[str, Any] | None]:
    """Reads a teacher that a run trained, and which images it was trained on (`LabelledImages.images`).

    Raises:
        CheckpointError: it is damaged, or was trained with another configuration.
    """
    remedy = "remove it to train the teacher again"
    state = checkpoint.load(path, remedy=remedy)
    teacher = image_teacher.untrained(config, data)
    weights: Any = state.get("teacher")
    if _forms(weights) != _forms(teacher.state_dict()) or not _is_of(state.get("config"), config):
        raise checkpoint.CheckpointError(f"{path} was trained with another [teacher] configuration; {remedy}")
    teacher.load_state_dict(weights)
    return teacher.eval(), state.get("basis")


def _forms(tensors: Any) -> dict[str, Any]:
    """Shape and dtype of each tensor; none where there are no tensors."""
    items = tensors.items() if isinstance(tensors, dict) else ()
    return {name: (value.shape, value.dtype) for name, value in items if isinstance(value, Tensor)}


def _is_of(saved: Any, config: TeacherConfig) -> bool:
    try:
        return isinstance(saved, dict) and from_dict(TeacherConfig, saved) == config
    except (ConfigError, TypeError):
        return False


def _of_each(labels: Tensor, classes: int) -> Tensor:
    """Indices of the first images of each class, for a picture with one class per row."""
    each = _PREVIEWS // classes
    return torch.cat([(labels == label).nonzero()[:each, 0] for label in range(classes)])
