"""The classifier of digits, and sets of them whose worth is known."""

import pytest
import torch

from emd_fast.tasks import digits_data
from emd_fast.tasks.digits_metrics import DigitFeatures, digits_metrics


@pytest.fixture(scope="module")
def features():
    return DigitFeatures()


def test_the_classifier_knows_digits_it_has_not_seen(features):
    images, labels = digits_data.load("test")
    assert (features.predict(images) == labels).float().mean() >= 0.98
    found = features.features(images)
    assert found.shape == (599, 64) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(features._network.last(found).argmax(1), features.predict(images))
    assert features.features(images[:0]).shape == (0, 64)
    with pytest.raises(ValueError, match=r"\(N, 1, 8, 8\), got \(3, 1, 28, 28\)"):
        features.features(torch.zeros(3, 1, 28, 28))


def test_the_classifier_depends_on_its_seed_alone():
    images, _ = digits_data.load("test")
    torch.manual_seed(0)
    one = DigitFeatures(3, steps=5).features(images)
    torch.manual_seed(1)
    assert torch.equal(DigitFeatures(3, steps=5).features(images), one)
    assert not torch.equal(DigitFeatures(4, steps=5).features(images), one)


def test_metrics_of_sets_that_are_known(features):
    images, labels = digits_data.load("test")
    generator = torch.Generator().manual_seed(0)
    # One clean image of each class, with a little noise: what a collapsed generator makes.
    first = torch.stack([images[labels == digit][0] for digit in range(10)])[labels]
    sets = {
        "test": (images, labels),
        "wrong": (images, (labels + 1) % 10),
        "collapsed": (first + 0.01 * torch.randn(first.shape, generator=generator), labels),
        "noise": (torch.randn(images.shape, generator=generator).clamp(-1, 1), labels),
        "asked for nothing": (images, None),
    }
    metrics = digits_metrics(sets, features)
    assert metrics["n"] == 599 and metrics["seed"] == 0
    distance = metrics["frechet"]
    assert list(distance) == ["real", *sets]
    assert distance["test"] < 1e-9 < distance["real"] < distance["collapsed"] / 3 < distance["noise"]
    assert metrics["recall"]["test"] == metrics["precision"]["test"] == 1
    assert metrics["recall"]["real"] > 0.8 and metrics["precision"]["real"] > 0.8
    assert metrics["recall"]["collapsed"] < 0.1 and metrics["precision"]["collapsed"] > 0.9
    assert metrics["accuracy"]["test"] >= 0.98 and metrics["accuracy"]["wrong"] <= 0.02
    assert metrics["accuracy"]["noise"] < 0.3 and metrics["accuracy"]["real"] > 0.98
    assert "asked for nothing" not in metrics["accuracy"]


def test_fewer_images_and_another_seed(features):
    images, labels = digits_data.load("test")
    one, same, other = (digits_metrics({"a": (images[:100], labels[:100])}, features, seed=seed) for seed in (1, 1, 2))
    assert one["n"] == 100 and one == same and one["frechet"]["real"] != other["frechet"]["real"]


def test_bad_sets(features):
    images, labels = digits_data.load("test")
    more = torch.cat([images, images[:1]]), torch.cat([labels, labels[:1]])
    for sets, said in (
        ({"a": (images, labels), "b": (images[1:], labels[1:])}, "every set needs 599 images.*'b' has 598 images"),
        ({"a": (images, labels[1:])}, r"'a' has 599 images and labels \(598,\)"),
        ({"real": (images, labels)}, "another name"),
        ({"a": more}, "4 to 599 images.*got 600"),
        ({"a": (images / 0, labels)}, "finite: 'a'"),
    ):
        with pytest.raises(ValueError, match=said):
            digits_metrics(sets, features)
