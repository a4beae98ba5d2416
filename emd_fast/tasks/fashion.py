"""The task "fashion": distils a small UNet trained here on Fashion-MNIST, and compares with held-out images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emd_fast import distributed
from emd_fast.config import RunConfig
from emd_fast.tasks import fashion_data, image_classifier
from emd_fast.tasks.image_cache import cached
from emd_fast.tasks.image_classifier import ImageFeatures, Training
from emd_fast.tasks.image_metrics import LabelledSet, Reference, by_metric, check_sets, subset
from emd_fast.tasks.labelled_images import LabelledImages
from emd_fast.train.trainer import EMDTrainer

_PICK_TEST, _PICK_TRAIN = 60_004, 60_005  # substeps of noise stream 9
_SEED = 0  # of the choice of real images, so that all runs are compared with the same ones
# Channels of the classifier, by the side of an image.
_WIDTHS = {14: (32, 96, 192), 28: (16, 32, 96, 192)}
_NOISE = 0.05


class Fashion(LabelledImages):
    def __init__(self, config: RunConfig) -> None:
        super().__init__(config, fashion_data.data(config.fashion.data, config.fashion.resolution))
        self.folder = fashion_data.place_of(config.fashion.data)

    @property
    def device(self) -> torch.device:
        return distributed.default_device()

    def open_references(self) -> None:
        self.check_images(self.images())

    def images(self) -> dict[str, Any]:
        return {"data": fashion_data.digest(self.folder)}

    def basis(self) -> dict[str, Any]:
        fashion = self.config.fashion
        return _judge_key(
            self.folder, fashion.resolution, _training(fashion.resolution, fashion.classifier_steps), self.device
        )

    def labels(self) -> Tensor:
        return self._judge.reference.labels

    def real(self) -> Tensor:
        return self._judge.images

    def metrics(self, samples: dict[str, LabelledSet], seed: int) -> dict[str, Any]:
        judge = self._judge
        n = check_sets(samples, most=len(judge.images), default=len(judge.images))
        found = {name: self._metrics_of(name, images, labels) for name, (images, labels) in samples.items()}
        return {
            **by_metric({"real": judge.real(), **found}),
            "n": n,
            "seed": seed,
            "classifier_accuracy": judge.accuracy,
        }

    def _metrics_of(self, name: str, images: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """The metrics of a set. Those of teacher and untrained generator are cached: many runs share them."""
        judge = self._judge
        if name not in ("teacher", "init"):
            return judge.reference.full(images, labels)
        parts = [images] if labels is None else [images, labels]
        digest = hashlib.sha256(b"".join(part.contiguous().cpu().numpy().tobytes() for part in parts)).hexdigest()
        made = cached("set", {**judge.key, "set": digest}, lambda: {"metrics": judge.reference.full(images, labels)})
        found: dict[str, Any] = made["metrics"]
        return found

    def of_teacher(self, trainer: EMDTrainer, cond: Tensor | None) -> Tensor:
        config = trainer.config
        if distributed.is_sharded(trainer.teacher):  # all ranks must make the same passes
            return super().of_teacher(trainer, cond)
        key = {
            "weights": trainer.teacher_facts["sha256"],
            "dtypes": [str(trainer.compute_dtype), config.adapter.base_dtype],
            "labels": [] if cond is None else cond.tolist(),
            "n": len(self.labels()),
            "seed": config.seed,
            "guidance": config.guidance,
            **_of_device(trainer.device),
        }
        made = cached(
            "teacher-samples", key, lambda: {"samples": {"x": super(Fashion, self).of_teacher(trainer, cond)}}
        )
        samples: Tensor = made["samples"]["x"]
        return samples.to(trainer.device)

    @property
    def _judge(self) -> Judge:
        fashion = self.config.fashion
        return _judge(self.folder, fashion.resolution, fashion.classifier_steps, self.device)


class Judge:
    """The classifier of a data folder, and the real images that sets are compared with.

    The classifier, the features of the held-out images and the metrics of real images of the train
    split are computed once for a folder's content, a resolution and a kind of device, and kept in the
    cache.

    Attributes:
        images: held-out images (N, 1, H, W): all of the test split, or as many as the train split has.
        reference: compares with them.
        accuracy: of the classifier on the test split.
        key: what all of it depends on, as `cached` takes it.
    """

    def __init__(self, folder: Path, resolution: int, steps: int, device: torch.device) -> None:
        self._data = fashion_data.data(str(folder), resolution)
        training = _training(resolution, steps)
        self.key = _judge_key(folder, resolution, training, device)
        test, train = self._data.load("test"), self._data.load("train")
        made = cached("classifier", self.key, lambda: self._trained(training, device))
        network = image_classifier.untrained(self._data, training)
        network.load_state_dict(made["classifier"])
        self.accuracy: float = made["accuracy"]
        n = min(len(test[0]), len(train[0]))
        self.images, labels = subset(test, n, _SEED, _PICK_TEST) if n < len(test[0]) else test
        self.reference = Reference(ImageFeatures(network, self._data.shape, device), self.images, labels)

    def real(self) -> dict[str, Any]:
        """The metrics of real images of the train split: the result of a perfect copy of them."""
        n = len(self.images)
        drawn = subset(self._data.load("train"), n, _SEED, _PICK_TRAIN)
        found: dict[str, Any] = cached("real", self.key, lambda: {"metrics": self.reference.full(*drawn)})["metrics"]
        return found

    def _trained(self, training: Training, device: torch.device) -> dict[str, Any]:
        network = image_classifier.trained(self._data, training, device)
        images, labels = self._data.load("test")
        right = ImageFeatures(network, self._data.shape, device).predict(images).cpu() == labels
        return {"classifier": network.state_dict(), "accuracy": right.double().mean().item()}


def _training(resolution: int, steps: int) -> Training:
    return Training(_WIDTHS[resolution], steps, _NOISE, flip=True, norm=True, ema=0.999)


def _judge_key(folder: Path, resolution: int, training: Training, device: torch.device) -> dict[str, Any]:
    """What the classifier and its features depend on, as plain values."""
    return {
        "data": fashion_data.digest(folder),
        "resolution": resolution,
        **dataclasses.asdict(training),
        "widths": list(training.widths),
        **_of_device(device),
    }


def _of_device(device: torch.device) -> dict[str, str]:
    """The part of a key in the cache that says where an entry was computed; none for the CPU."""
    return {} if device.type == "cpu" else {"device": device.type}


_judge = functools.lru_cache(2)(Judge)
