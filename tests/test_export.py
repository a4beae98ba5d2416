"""Generators of the project's own networks in one safetensors file."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from emd_fast import Denoiser, EMDConfig, EMDTrainer, Noise, schedules
from emd_fast.export import pipeline
from emd_fast.teachers import gaussian_mixture
from emd_fast.teachers.mlp import PointGenerator, TimeMLP
from emd_fast.teachers.small_unet import SmallUNet, initialise


def points(generator=None):
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    teacher = gaussian_mixture(torch.tensor([0.5, 0.5]), means, 0.1 * torch.eye(2).expand(2, 2, 2), schedules.EDM())
    fake_score = Denoiser(TimeMLP(2, 8, 2, seed=1), schedules.EDM(), "edm", sigma_data=1.0, sample_shape=(2,))
    config = EMDConfig(steps=2, batch_size=4, langevin_steps=1, seed=3, generator_lr=1e-2)
    return EMDTrainer(teacher, config, generator or PointGenerator(2, 8, 1, seed=2), fake_score)


def images(**changes):
    network = SmallUNet(1, channels=8, num_classes=3, embedding=16)
    initialise(network, 0)
    teacher = Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(1, 4, 4))
    options = {"steps": 2, "batch_size": 4, "langevin_steps": 1, "num_classes": 3, "generator_lr": 1e-2, **changes}
    return EMDTrainer(teacher, EMDConfig(**options))


def patches_without_a_class():
    network = SmallUNet(1, channels=8, num_classes=3, embedding=16, null_label=3, patch=2)
    initialise(network, 0)
    teacher = Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(1, 6, 6), null_cond=3)
    return EMDTrainer(teacher, EMDConfig(steps=2, batch_size=4, langevin_steps=1, generator_lr=1e-2))


def mlp_behind_a_denoiser():
    denoiser = Denoiser(TimeMLP(2, 8, 2, seed=1), schedules.VP(torch.linspace(1e-4, 0.02, 100)), "v", sample_shape=(2,))
    return EMDTrainer(denoiser, EMDConfig(steps=2, batch_size=4, langevin_steps=1, t_star=0.7, input_scale=0.5))


@pytest.mark.parametrize(
    "make", [points, images, patches_without_a_class, mlp_behind_a_denoiser, lambda: images(precision="bfloat16")]
)
@pytest.mark.parametrize("ema", [True, False])
def test_the_file_gives_the_bits_of_the_trainer(make, ema, tmp_path):
    trainer = make()
    for _ in range(2):
        trainer.step()
    loaded = pipeline.load(pipeline.export(trainer, tmp_path / "one.safetensors", "safetensors", ema=ema))
    assert torch.equal(loaded.sample(5), trainer.generate(5, ema=ema))
    assert torch.equal(loaded.sample(2, first_sample=3), trainer.generate(2, ema=ema, first_sample=3))
    assert not torch.equal(loaded.sample(5, seed=99), loaded.sample(5))
    assert not torch.equal(trainer.generate(5), trainer.generate(5, ema=False))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_several_calls_in_a_file_give_the_bits_of_the_trainer(precision, tmp_path):
    trainer = images(rungs=[2.0, 0.7, 0.2], precision=precision)
    trainer.step()
    loaded = pipeline.load(pipeline.export(trainer, tmp_path / "few.safetensors", "safetensors"))
    for calls in (1, 2, 3, None):
        assert torch.equal(loaded.sample(5, calls=calls), trainer.generate(5, calls=calls))
    assert torch.equal(loaded.sample(2, first_sample=3), trainer.generate(2, first_sample=3))
    with pytest.raises(ValueError, match=r"calls must be in \[1, 3\], the rungs of this generator, got 4"):
        loaded.sample(2, calls=4)


def test_labels_follow_the_generator_to_its_device(tmp_path, monkeypatch):
    trainer, labels = images(), torch.tensor([2, 1])
    loaded = pipeline.load(pipeline.export(trainer, tmp_path / "one.safetensors", "safetensors")).to("meta")
    passed = []
    monkeypatch.setattr(loaded, "samples", lambda noises, cond: passed.append(cond) or noises)
    loaded.sample(2, labels)
    trainer.batches.noise = Noise(0, device="meta")
    passed.append(trainer.batches.shown(2, cond=labels)[1])
    assert [cond.device.type for cond in passed] == ["meta", "meta"]


def test_the_file_of_one_call_has_the_facts_of_earlier_releases(tmp_path):
    told = []
    for settings in ({}, {"rungs": 2}):
        path = pipeline.export(images(**settings), tmp_path / f"{len(told)}.safetensors", "safetensors")
        with safe_open(str(path), "pt") as file:
            told.append(json.loads(file.metadata()["emd_fast"])["generator"])
    assert told[1].keys() - told[0].keys() == {"rungs"} and told[0].keys() <= told[1].keys()
    with pytest.raises(ValueError, match=r"calls must be in \[1, 1\]"):
        pipeline.load(tmp_path / "0.safetensors").sample(2, calls=2)


def test_a_network_that_fuse_refuses_is_loaded_as_it_is(tmp_path):
    network = SmallUNet(1, 132)  # one head of 264 dimensions
    teacher = Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(1, 8, 8))
    trainer = EMDTrainer(teacher, EMDConfig(steps=1, batch_size=2, num_classes=10, fuse=False))
    pipeline.export(trainer, tmp_path / "wide.safetensors", format="safetensors")
    with pytest.warns(UserWarning, match=r"wide\.safetensors is not fused: .*256"):
        one_step = pipeline.load(tmp_path / "wide.safetensors")
    assert torch.equal(one_step.sample(2), trainer.generate(2))


def test_the_generator_of_a_trainer_is_what_the_numbers_say(tmp_path):
    trainer = mlp_behind_a_denoiser()
    loaded = pipeline.load(pipeline.export(trainer, tmp_path / "x", "safetensors"))
    z = torch.randn(6, 2)
    t = torch.full((6,), 0.7)
    expected = trainer.ema.module.denoiser.denoise(0.5 * z, t)
    torch.testing.assert_close(loaded(z), expected, rtol=1e-6, atol=1e-6)


class Mine(nn.Linear):
    sample_shape = (2,)

    def forward(self, z, cond=None):
        return super().forward(z)


def with_output():
    form = {"sigma_data": 1.0, "sample_shape": (2,), "output": lambda returned: -returned}
    denoiser = Denoiser(TimeMLP(2, 8, 1, seed=1), schedules.EDM(), "edm", **form)
    return EMDTrainer(denoiser, EMDConfig(steps=1, batch_size=2))


@pytest.mark.parametrize(
    ("make", "format", "said"),
    [
        (lambda: points(Mine(2, 2)), "safetensors", "a Mine cannot be described in a file: SmallUNet"),
        (points, "diffusers", "needs a teacher from a folder of diffusers"),
        (points, "onnx", "format must be"),
        (with_output, "safetensors", "an `output` of its own"),
    ],
)
def test_what_cannot_be_described_is_refused_before_anything_is_written(tmp_path, make, format, said):
    with pytest.raises(ValueError, match=said):
        pipeline.export(make(), tmp_path / "x", format)
    assert not list(tmp_path.iterdir())


def test_files_of_others_and_of_later_versions(tmp_path):
    (tmp_path / "text").write_text("no")
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    later = {"emd_fast": json.dumps({"version": 99, "generator": {}})}
    save_file({"a": torch.ones(1)}, tmp_path / "later", metadata=later)
    for name, said in {
        "nowhere": "cannot read",
        "text": "cannot read",
        "other": "was not written by",
        "later": "has format version 99, this release reads 1",
    }.items():
        with pytest.raises(ValueError, match=said):
            pipeline.load(tmp_path / name)
