"""The classifier whose features judge labelled images."""

import copy
import dataclasses

import pytest
import torch
from test_fashion import written

from emd_fast.tasks import fashion_data, image_classifier
from emd_fast.tasks.image_classifier import Training

PLAIN = Training(widths=(4, 8), steps=3, noise=0.1)


@pytest.fixture
def data(tmp_path):
    return fashion_data.data(str(written(tmp_path / "data")), 14)


def weights_after_each_step(data, training, monkeypatch):
    """The weights before the training and after each of its steps, and those of the result."""
    seen = []
    make = torch.optim.AdamW

    def recorded(parameters, **named):
        parameters = list(parameters)
        seen.append([p.detach().clone() for p in parameters])
        optimizer = make(parameters, **named)
        optimizer.register_step_post_hook(lambda *_: seen.append([p.detach().clone() for p in parameters]))
        return optimizer

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", recorded)
        result = image_classifier.trained(data, training)
    return seen, list(result.parameters())


def test_the_result_is_the_average_of_the_weights(data, monkeypatch):
    seen, result = weights_after_each_step(data, dataclasses.replace(PLAIN, ema=0.15), monkeypatch)
    average = copy.deepcopy(seen[0])
    for step, now in enumerate(seen[1:]):
        decay = min(0.15, (1 + step) / (10 + step))  # the warm-up of the average
        average = [decay * a + (1 - decay) * b for a, b in zip(average, now, strict=True)]
    for ours, expected, last in zip(result, average, seen[-1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(ours, last)


def test_without_an_average_the_result_is_the_last_weights(data, monkeypatch):
    seen, result = weights_after_each_step(data, PLAIN, monkeypatch)
    assert len(seen) == 4 and all(map(torch.equal, result, seen[-1]))
    assert not any(map(torch.equal, seen[0], seen[-1]))


def test_norms_are_behind_the_convolutions(data):
    plain = image_classifier.untrained(data, PLAIN)
    normed = image_classifier.untrained(data, dataclasses.replace(PLAIN, norm=True))
    assert normed.state_dict().keys() - plain.state_dict().keys() == {
        f"norms.{i}.{name}" for i in range(2) for name in ("weight", "bias")
    }
    images = torch.randn(2, *data.shape)
    torch.nn.init.constant_(normed.norms[0].weight, 0)
    assert not torch.nn.functional.silu(normed.norms[0](normed.convolutions[0](images))).any()
    torch.nn.init.constant_(normed.norms[1].weight, 0)
    expected = torch.nn.functional.silu(normed.hidden.bias).expand(2, -1)
    assert torch.equal(normed.features(images), expected), "a norm of 0 leaves nothing of the images"
