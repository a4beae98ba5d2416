"""Exported generators of an attacker, and damaged ones: one line names the file, and nothing of it is used."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct

import diffusers_folders
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from watch import PROCESSES, bounded, watched

from emd_fast import Denoiser, EMDConfig, EMDTrainer, schedules
from emd_fast.export import facts
from emd_fast.export.pipeline import EXPORTED, export, load
from emd_fast.io import signed
from emd_fast.teachers.mlp import TimeMLP

for name in ("UNet2DModel", "DiTTransformer2DModel"):  # imported here, not inside the watch
    getattr(pytest.importorskip("diffusers"), name)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    teacher = Denoiser(TimeMLP(2, 8, 2, seed=1), schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(2,))
    trainer = EMDTrainer(teacher, EMDConfig(steps=1, batch_size=4))
    return export(trainer, tmp_path_factory.mktemp("made") / "one.safetensors", "safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from emd_fast.teachers import diffusers as teachers

    path = tmp_path_factory.mktemp("made")
    trainer = EMDTrainer(
        teachers.load(diffusers_folders.dit(path / "teacher")),
        EMDConfig(steps=1, batch_size=2, num_classes=10, t_star=0.6),
    )
    return export(trainer, path / "one")


def at(*keys, value):
    def change(table):
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value

    return change


def without(*keys):
    def change(table):
        for key in keys[:-1]:
            table = table[key]
        del table[keys[-1]]

    return change


def refused(path):
    with watched(PROCESSES), bounded(300), pytest.raises(ValueError) as error:
        load(path)
    said = str(error.value)
    assert str(path) in said and "\n" not in said and len(said) < 700 + 2 * len(str(path)), said
    return said


CONFIG = ("network", "config")
FACTS = {
    "no generator": without("generator"),
    "no network": without("network"),
    "a fact more": at("loader", value="os.system"),
    "a version of text": at("version", value="1"),
    "a version that is true": at("version", value=True),
    "a version of 10^30": at("version", value=10**30),
    "a generator of text": at("generator", value="os.system"),
    "a generator that is a list": at("generator", value=[]),
    "a key less": without("generator", "seed"),
    "a key more": at("generator", "__class__", value="x"),
    "a dtype that is a function": at("generator", "dtype", value="load"),
    "a dtype that is a module": at("generator", "dtype", value="os"),
    "a dtype that is dunder": at("generator", "dtype", value="__builtins__"),
    "a dtype that is a list": at("generator", "dtype", value=["float32"]),
    "a precision that is none": at("generator", "precision", value="float8"),
    "a scale of text": at("generator", "c_skip", value="1"),
    "a scale that is true": at("generator", "c_out", value=True),
    "a scale that is no number": at("generator", "c_in", value=float("nan")),
    "a scale of infinity": at("generator", "input_scale", value=float("inf")),
    "a scale of 400 digits": at("generator", "input_scale", value=10**400),
    "a shape of text": at("generator", "sample_shape", value="2"),
    "a shape of nothing": at("generator", "sample_shape", value=[]),
    "a shape of 2^40": at("generator", "latent_shape", value=[2**40]),
    "a shape of 2^40 by parts": at("generator", "latent_shape", value=[2**20, 2**20]),
    "a negative shape": at("generator", "latent_shape", value=[-2]),
    "a shape of 500": at("generator", "latent_shape", value=[1] * 500),
    "a negative seed": at("generator", "seed", value=-1),
    "a seed of 2^80": at("generator", "seed", value=2**80),
    "classes of text": at("generator", "num_classes", value="10"),
    "classes of 2^60": at("generator", "num_classes", value=2**60),
    "an average of text": at("generator", "ema", value="yes"),
    "a t_star of text": at("generator", "t_star", value="2"),
    "a network of text": at("network", value="TimeMLP"),
    "a network without a class": without("network", "class"),
    "a network with more": at("network", "module", value="os"),
    "a class that is a list": at("network", "class", value=["TimeMLP"]),
    "a class that is a function": at("network", "class", value="is_torch_available"),
    "a class of torch": at("network", "class", value="Linear"),
    "a class that is a pipeline": at("network", "class", value="DiffusionPipeline"),
    "a class of diffusers": at("network", "class", value="UNet2DModel"),
    "a class of diffusers with layers of 10^7": lambda table: table.update(
        network={"class": "UNet2DModel", "config": {"layers_per_block": 10**7}}
    ),
    "a class of diffusers of 2^20": lambda table: table.update(
        network={"class": "DiTTransformer2DModel", "config": {"attention_head_dim": 2**20, "num_layers": 200}}
    ),
    "a class of diffusers with code": lambda table: table.update(
        network={"class": "UNet2DModel", "config": {"auto_map": {"AutoModel": "x.Y"}}}
    ),
    "a configuration that is a list": at(*CONFIG, value=[]),
    "a configuration that is a path": at(*CONFIG, value="/etc"),
    "an argument less": without(*CONFIG, "width"),
    "an argument more": at(*CONFIG, "device", value="cuda"),
    "layers of 10^7": at(*CONFIG, "layers", value=10**7),
    "a layer more": at(*CONFIG, "layers", value=3),
    "a width of 2^40": at(*CONFIG, "width", value=2**40),
    "a width of text": at(*CONFIG, "width", value="8"),
    "a width that is a list": at(*CONFIG, "width", value=[8]),
    "another width": at(*CONFIG, "width", value=9),
    "digests of text": at("digests", value="x"),
    "another digest": at("digests", "weights", value="0" * 64),
}


@pytest.mark.parametrize("name", FACTS)
def test_facts_that_lie(file, tmp_path, name):
    with safe_open(str(file), "pt") as there:
        table = signed.table_of(there.metadata()["emd_fast"].encode())
        weights = {key: there.get_tensor(key) for key in there.keys()}
    FACTS[name](table)
    path = tmp_path / "one.safetensors"
    save_file(weights, path, {"emd_fast": signed.json_of(table)})  # by somebody who signs it again
    refused(path)


FILES = {
    "nothing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "a fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 8),
    "a header of 2^60": lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
    "facts of brackets": lambda path: save_file({"a": torch.ones(1)}, path, {"emd_fast": "[" * 10**6}),
    "facts that are no JSON": lambda path: save_file({"a": torch.ones(1)}, path, {"emd_fast": "{"}),
    "facts that are a number": lambda path: save_file({"a": torch.ones(1)}, path, {"emd_fast": "3"}),
    "no tensors": lambda path: save_file({}, path, {"emd_fast": "{}"}),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_something_else(file, tmp_path, name):
    path = tmp_path / "one.safetensors"
    shutil.copy(file, path)
    FILES[name](path)
    refused(path)


def test_bits_of_a_file_are_named(file, tmp_path):
    path, draw, content = tmp_path / "one.safetensors", random.Random(0), file.read_bytes()
    for _ in range(60):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        refused(path)


def test_bits_of_a_folder_are_named(folder, tmp_path):
    draw = random.Random(1)
    names = [EXPORTED, "transformer/diffusion_pytorch_model.safetensors", "transformer/config.json", "vae/config.json"]
    for name in [name for name in names for _ in range(20)]:
        path = tmp_path / "one"
        shutil.copytree(folder, path)
        damaged = bytearray((path / name).read_bytes())
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (path / name).write_bytes(damaged)
        assert name in refused(path)
        shutil.rmtree(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "vae/../../x", "", "a\0b"])
def test_a_folder_states_digests_of_its_own_files_alone(folder, tmp_path, name):
    path = shutil.copytree(folder, tmp_path / "one")
    table = signed.table_of((path / EXPORTED).read_bytes(), indent=2)
    table["digests"][name] = "0" * 64
    (path / EXPORTED).write_text(signed.json_of(table, indent=2))
    assert "no file in it" in refused(path)


def test_what_earlier_releases_wrote_is_read(file, folder, tmp_path):
    with safe_open(str(file), "pt") as there:
        table = signed.table_of(there.metadata()["emd_fast"].encode())
        weights = {key: there.get_tensor(key) for key in there.keys()}
    del table["digests"]
    save_file(weights, tmp_path / "one.safetensors", {"emd_fast": json.dumps(table)})
    assert torch.equal(load(tmp_path / "one.safetensors").sample(3), load(file).sample(3))
    assert facts.VERSION == table["version"] == 1
