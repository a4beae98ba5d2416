"""The task "fashion" on two ranks: what is cached, and what every rank has to compute."""

import os
import types

import pytest
import torch
from test_fashion import settings, written

from emd_fast import EMDTrainer, distributed
from emd_fast.tasks import image_cache, labelled_images
from emd_fast.tasks.fashion import Fashion
from emd_fast.tasks.image_metrics import Reference

CPU = torch.device("cpu")


def passes_of_the_teacher(data, folder, mode) -> tuple[bool, int, list[float]]:
    """Whether the teacher is sharded, how often this rank sampled it, and a few of the samples."""
    os.environ[image_cache.VARIABLE] = str(folder / "cache")
    sampled, heun, default_device = [], labelled_images.heun, distributed.default_device

    def counted(*given, **named):
        sampled.append(1)
        return heun(*given, **named)

    labelled_images.heun, distributed.default_device = counted, lambda: CPU
    try:
        task = Fashion(settings(data, emd__parallelism__parallel=mode))
        distributed.on_main(lambda: task.make_teacher(folder, None) and None)
        trainer = EMDTrainer(task.make_teacher(folder, None), task.config.emd)
        with distributed.gathered(trainer.teacher):
            samples = task.of_teacher(trainer, task._conditions(trainer))
        return distributed.is_sharded(trainer.teacher), len(sampled), samples[:2, 0, 0].tolist()
    finally:
        labelled_images.heun, distributed.default_device = heun, default_device
        del os.environ[image_cache.VARIABLE]


@pytest.mark.parametrize(("mode", "sampled"), [("replicate", 1), ("fsdp", 2)])
def test_every_rank_samples_a_sharded_teacher_and_one_samples_copies(ranks, tmp_path, mode, sampled):
    data = written(tmp_path / "data")
    (sharded, first, samples), (_, second, others) = ranks(2, passes_of_the_teacher, data, tmp_path, mode)
    assert sharded == (mode == "fsdp")
    assert first + second == sampled
    assert samples == others


def metrics_of_a_set() -> dict:
    """The metrics of a set that this rank has whole, by a classifier that reads the first pixels."""
    images = torch.rand(40, 1, 14, 14, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 10
    classifier = types.SimpleNamespace(features=lambda x: x.flatten(1)[:, :12], logits=lambda found: found[:, :10])
    return Reference(classifier, images, labels).full(images.flip(0) * 0.9, labels.flip(0))


def test_the_metrics_of_a_set_do_not_depend_on_the_ranks(ranks):
    assert ranks(2, metrics_of_a_set) == [metrics_of_a_set()] * 2
