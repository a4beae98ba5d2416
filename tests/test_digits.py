"""The digits teacher: data, network, initial weights, training."""

import copy
import dataclasses
import sys

import pytest
import torch
from helpers import randomised, threads

from emd_fast.config import ConfigError, TeacherConfig
from emd_fast.diffusion.sampler import heun
from emd_fast.noise import Noise
from emd_fast.ops import normal
from emd_fast.tasks import digits_data, image_teacher
from emd_fast.tasks.digits_data import DIGITS
from emd_fast.tasks.digits_metrics import DigitFeatures, digits_metrics
from emd_fast.teachers.small_unet import SmallUNet, initialise
from emd_fast.train.average import EMA

SHORT = TeacherConfig(steps=30, batch_size=32, warmup=5)


@pytest.fixture(autouse=True)
def one_thread():
    """Trainings of a few small steps: where the cores are shared, a second thread makes them slow beyond reason."""
    with threads(1):
        yield


def test_the_split_is_fixed_disjoint_and_balanced():
    from sklearn.datasets import load_digits

    (train, train_labels), (test, test_labels) = digits_data.load("train"), digits_data.load("test")
    assert train.shape == (1198, 1, 8, 8) and test.shape == (599, 1, 8, 8)
    assert train.dtype == torch.float32 and train_labels.dtype == torch.int64
    assert train.min() == -1 and train.max() == 1
    # Together they are the whole data set, each image once.
    counts, _ = load_digits(return_X_y=True)
    whole = torch.cat([train, test]).flatten(1)
    assert sorted(map(tuple, (whole * 8 + 8).tolist())) == sorted(map(tuple, counts.tolist()))
    share = test_labels.bincount() / torch.cat([train_labels, test_labels]).bincount()
    assert (share - 1 / 3).abs().max() < 0.005
    again, _ = digits_data.load("test")
    assert torch.equal(again, test)
    # The split that published figures are for.
    assert test_labels[:12].tolist() == [0, 3, 5, 6, 0, 1, 2, 5, 6, 8, 3, 4]


def test_what_cannot_be_loaded(monkeypatch):
    with pytest.raises(ValueError, match="'train' or 'test', got 'validation'"):
        digits_data.load("validation")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"emd_fast\[digits\]"):
        digits_data.load("train")


def test_the_images_go_with_their_labels():
    images, labels = digits_data.load("train")
    assert digits_data.SIGMA_DATA == pytest.approx(images.std().item(), abs=0.005)
    centres = torch.stack([images[labels == digit].flatten(1).mean(0) for digit in range(10)])
    held_out, truth = digits_data.load("test")
    nearest = torch.cdist(held_out.flatten(1), centres).argmin(1)
    assert (nearest == truth).float().mean() > 0.85


def test_initial_weights_are_those_of_the_contract():
    network = randomised(SmallUNet(1), 0)  # whatever they were before
    initialise(network, 5)
    names = [name for name, _ in network.named_parameters()]
    index = names.index("middle_block.conv1.weight")
    drawn = normal((32, 32, 3, 3), Noise(5), stream=13, substep=index)
    torch.testing.assert_close(network.middle_block.conv1.weight, drawn / (32 * 9) ** 0.5)
    assert not network.last.weight.any() and not network.down_block.conv2.weight.any()
    assert (network.norm.weight == 1).all() and not network.norm.bias.any()
    assert network.embedding.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)
    assert network.class_embedding.weight.std().item() == pytest.approx(1, rel=0.1)
    with pytest.raises(TypeError, match="'weight_ih_l0' of LSTM"):
        initialise(torch.nn.LSTM(2, 2), 0)


def test_the_network_has_the_size_it_claims_and_starts_as_zero():
    network = SmallUNet(1)
    assert sum(parameter.numel() for parameter in network.parameters()) == 82_801
    assert not network(torch.randn(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 9])).any()


def test_the_output_depends_on_everything_and_on_no_other_sample():
    network = randomised(SmallUNet(1), 0)
    x, c_noise, labels = torch.randn(4, 1, 8, 8), torch.randn(4), torch.tensor([0, 3, 3, 9])
    before = network(x, c_noise, labels)
    changed = (
        (x + torch.tensor([0, 1, 0, 0.0])[:, None, None, None], c_noise, labels),
        (x, c_noise + torch.tensor([0, 0.3, 0, 0]), labels),
        (x, c_noise, torch.tensor([0, 4, 3, 9])),
    )
    for arguments in changed:
        difference = (network(*arguments) - before).abs().amax((1, 2, 3))
        assert difference[1] > 1e-3
        assert difference[[0, 2, 3]].max() < 1e-5


@pytest.mark.parametrize(
    ("changes", "shape", "labels", "error", "message"),
    [
        ({}, (8, 8), [0, 10], ValueError, r"labels must be in \[0, 10\), got from 0 to 10"),
        ({}, (8, 8), [-1, 3], ValueError, r"labels must be in \[0, 10\), got from -1 to 3"),
        ({}, (8, 8), [1, 2, 3], ValueError, r"labels must have shape \(2,\), got \(3,\)"),
        ({}, (8, 8), [1.0, 2.0], TypeError, "labels must be int64, got torch.float32"),
        ({}, (8, 8), None, ValueError, "labels must be given"),
        ({"num_classes": 0}, (8, 8), [0, 0], ValueError, "no classes"),
        ({"patch": 2}, (7, 8), [0, 0], ValueError, "whole patches of 2, got"),
        ({"patch": 0}, (8, 8), [0, 0], ValueError, "patch must be at least 1, got 0"),
        ({"channels": 6}, (8, 8), [0, 0], ValueError, "channels must be a multiple of 4, got 6"),
    ],
)
def test_bad_input(changes, shape, labels, error, message):
    with pytest.raises(error, match=message):
        SmallUNet(1, **changes)(torch.zeros(2, 1, *shape), torch.zeros(2), labels and torch.tensor(labels))


def test_patches_are_positions_of_the_network():
    network = randomised(SmallUNet(1, patch=2), 0)
    labels = torch.tensor([0, 9])
    x, c_noise = torch.randn(2, 1, 14, 10), torch.randn(2)
    out = network(x, c_noise, labels)
    inner = randomised(SmallUNet(4), 0)
    inner.load_state_dict(network.state_dict())
    split = x.reshape(2, 7, 2, 5, 2).permute(0, 2, 4, 1, 3).reshape(2, 4, 7, 5)
    expected = inner(split, c_noise, labels).reshape(2, 2, 2, 7, 5).permute(0, 3, 1, 4, 2).reshape(x.shape)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("size", [(16, 12), (7, 9)])
def test_colour_images_without_classes_and_a_copy(size):
    network = randomised(SmallUNet(3, channels=8, num_classes=0), 0)
    x, c_noise = torch.randn(2, 3, *size), torch.randn(2)
    out = network(x, c_noise)
    assert out.shape == x.shape
    fresh = SmallUNet(3, channels=8, num_classes=0)
    fresh.load_state_dict(copy.deepcopy(network.state_dict()))
    torch.testing.assert_close(fresh(x.contiguous(memory_format=torch.channels_last), c_noise), out)


def weights(denoiser):
    return torch.cat([parameter.detach().flatten() for parameter in denoiser.parameters()])


def test_training_depends_on_the_configuration_alone_and_lowers_the_loss():
    losses = []
    torch.manual_seed(1)
    one = image_teacher.train(SHORT, DIGITS, lambda step, loss: losses.append((step, loss.item())))
    torch.manual_seed(2)
    two = image_teacher.train(SHORT, DIGITS)
    assert torch.equal(weights(one), weights(two))
    assert [step for step, _ in losses] == list(range(1, 31))
    first, last = (sum(loss for _, loss in part) / 5 for part in (losses[:5], losses[-5:]))
    assert last < 0.75 * first
    assert not one.training and one.sample_shape == (1, 8, 8) and one.sigma_data == digits_data.SIGMA_DATA
    other = image_teacher.train(dataclasses.replace(SHORT, steps=3, seed=1), DIGITS)
    assert not torch.equal(weights(other), weights(image_teacher.train(dataclasses.replace(SHORT, steps=3), DIGITS)))


def test_the_result_is_the_average_of_the_weights(monkeypatch):
    seen, update = [], EMA.update
    monkeypatch.setattr(EMA, "update", lambda self, net, step: seen.append(weights(net)) or update(self, net, step))
    result = image_teacher.train(dataclasses.replace(SHORT, steps=4, ema=0.2, lr=0.1, warmup=0), DIGITS)
    expected = weights(image_teacher.untrained(SHORT, DIGITS))
    for decay, after_step in zip((1 / 10, 2 / 11, 0.2, 0.2), seen, strict=True):
        expected = decay * expected + (1 - decay) * after_step
    torch.testing.assert_close(weights(result), expected)
    assert (weights(result) - seen[-1]).abs().max() > 1e-3


def test_unconditional_training_and_one_interrupted():
    teacher = image_teacher.train(dataclasses.replace(SHORT, steps=2, conditional=False), DIGITS)
    assert teacher.denoise(torch.zeros(2, 1, 8, 8), torch.ones(2)).shape == (2, 1, 8, 8)

    def stop(step, loss):
        assert step == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        image_teacher.train(SHORT, DIGITS, stop)


def test_a_training_that_diverges_says_so():
    with pytest.raises(FloatingPointError, match="lower its lr"):
        image_teacher.train(dataclasses.replace(SHORT, steps=8, lr=1e30, warmup=0), DIGITS)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    factors = [image_teacher.learning_rate_factor(step, 100, 10) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors.index(max(factors)) == 9
    assert factors[50] == pytest.approx(0.5) and 0 < factors[99] < 1e-3
    assert image_teacher.learning_rate_factor(0, 1, 0) == 1


@pytest.mark.exhaustive
@pytest.mark.first
def test_the_teacher_makes_digits():
    steps = 700
    assert steps < TeacherConfig().steps
    teacher = image_teacher.train(TeacherConfig(steps=steps), DIGITS)
    _, labels = digits_data.load("test")
    z = normal((len(labels), *digits_data.SHAPE), Noise(0), stream=9)
    metrics = digits_metrics({"teacher": (heun(teacher, z, labels), labels)}, DigitFeatures())
    assert metrics["frechet"]["teacher"] < 1.4 * metrics["frechet"]["real"]
    assert metrics["accuracy"]["teacher"] > 0.97
    assert metrics["recall"]["teacher"] > 0.8


# The transformer ------------------------------------------------------------------------------------------------------

DIT = dataclasses.replace(SHORT, network="dit", channels=4)


@pytest.fixture
def dit():
    pytest.importorskip("diffusers")
    return image_teacher.untrained(DIT, DIGITS)


def test_the_transformer_starts_at_0_and_takes_the_noise_level_in_log_steps(dit):
    labels = torch.arange(4)
    assert not dit(normal((4, 1, 8, 8), Noise(0), stream=0), torch.full((4,), 0.5), labels).any()
    t = torch.tensor([0.002, 0.4, 80.0])
    torch.testing.assert_close(dit.network_inputs(t)[1], torch.tensor([0.0, 500.0, 1000.0]))
    names = {name.split(".")[-2] for name, p in dit.named_parameters() if not p.any() and name.endswith("weight")}
    assert names == {"linear", "proj_out_2"}


def test_the_transformer_learns_and_its_weights_are_those_of_the_seed(dit):
    losses = []
    trained = image_teacher.train(DIT, DIGITS, lambda step, loss: losses.append(loss.item()))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    again = image_teacher.untrained(DIT, DIGITS)
    assert all(torch.equal(p, q) for p, q in zip(dit.parameters(), again.parameters(), strict=True))
    other = image_teacher.untrained(dataclasses.replace(DIT, seed=1), DIGITS)
    name = "network.model.proj_out_1.weight"
    assert not torch.equal(other.get_parameter(name), dit.get_parameter(name))
    assert not trained.training  # a label would be dropped at random


def test_the_transformer_needs_labels():
    for changes in ({"conditional": False}, {"label_dropout": 0.1}):
        with pytest.raises(ConfigError, match='network = "dit" has no label dropout, and its own patches'):
            TeacherConfig(network="dit", **changes)
