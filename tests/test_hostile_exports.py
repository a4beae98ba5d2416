"""Exported generators of an attacker, and damaged ones: one line names the file, and nothing of it is used."""

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
from watch import PROCESSES, at, bounded, fields, one_line, turned, watched

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
    config = EMDConfig(steps=1, batch_size=2, num_classes=10, t_star=0.6)
    return export(EMDTrainer(teachers.load(diffusers_folders.dit(path / "teacher")), config), path / "one")


def refused(path):
    with watched(PROCESSES), bounded(300), pytest.raises(ValueError) as error:
        load(path)
    return one_line(error, path)


NAN, INF = float("nan"), float("inf")
WRONG = {
    "loader": ["os.system"], "version": ["1", True, 10**30], "generator": ["os.system", []],
    "generator.__class__": ["x"], "generator.dtype": ["load", "os", "__builtins__", ["float32"]],
    "generator.precision": ["float8"], "generator.c_skip": ["1"], "generator.c_out": [True], "generator.c_in": [NAN],
    "generator.input_scale": [INF, 10**400], "generator.sample_shape": ["2", []],
    "generator.latent_shape": [[2**40], [2**20, 2**20], [-2], [1] * 500], "generator.seed": [-1, 2**80],
    "generator.num_classes": ["10", 2**60], "generator.ema": ["yes"], "generator.t_star": ["2"],
    "generator.rungs": ["x", [], [[1.0] * 6], [[1.0] * 5] * 2, [[1.0] * 5 + [NAN]] * 2, [[1.0] * 5 + ["1"]] * 2],
    "network": [
        "TimeMLP", {"class": "UNet2DModel", "config": {"layers_per_block": 10**7}},
        {"class": "DiTTransformer2DModel", "config": {"attention_head_dim": 2**20, "num_layers": 200}},
        {"class": "UNet2DModel", "config": {"auto_map": {"AutoModel": "x.Y"}}},
    ],
    "network.module": ["os"],
    "network.class": [["TimeMLP"], "is_torch_available", "Linear", "DiffusionPipeline", "UNet2DModel"],
    "network.config": [[], "/etc"], "network.config.device": ["cuda"], "network.config.layers": [10**7, 3],
    "network.config.width": [2**40, "8", [8], 9], "digests": ["x"], "digests.weights": ["0" * 64],
}  # fmt: skip
MISSING = ["generator", "network", "generator.seed", "network.class", "network.config.width"]
FACTS = fields(WRONG) | {f"no {path}": at(*path.split(".")) for path in MISSING}


def parts_of(file):
    with safe_open(str(file), "pt") as there:
        return signed.table_of(there.metadata()["emd_fast"].encode()), {
            key: there.get_tensor(key) for key in there.keys()
        }


@pytest.mark.parametrize("name", FACTS)
def test_facts_that_lie(file, tmp_path, name):
    table, weights = parts_of(file)
    FACTS[name](table)
    path = tmp_path / "one.safetensors"
    save_file(weights, path, {"emd_fast": signed.json_of(table)})  # by somebody who signs it again
    refused(path)


def facts_of(text):
    return lambda path: save_file({"a": torch.ones(1)}, path, {"emd_fast": text})


FILES = {
    "nothing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "a fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 8),
    "a header of 2^60": lambda path: path.write_bytes(struct.pack("<Q", 2**60) + b"{}"),
    **{f"facts {text[:2]}": facts_of(text) for text in ("[" * 10**6, "{", "3")},
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
        path.write_bytes(turned(content, draw))
        refused(path)


def test_bits_of_a_folder_are_named(folder, tmp_path):
    draw = random.Random(1)
    names = [EXPORTED, "transformer/diffusion_pytorch_model.safetensors", "transformer/config.json", "vae/config.json"]
    for name in [name for name in names for _ in range(20)]:
        path = shutil.copytree(folder, tmp_path / "one")
        (path / name).write_bytes(turned((path / name).read_bytes(), draw))
        assert name in refused(path)
        shutil.rmtree(path)


ADDED = ["model.fp16.safetensors", "diffusion_pytorch_model.safetensors.index.json", "x.py"]


@pytest.mark.parametrize("name", [*(f"transformer/{name}" for name in ADDED), "vae/more/x.bin", "config.json"])
def test_a_file_that_is_not_of_the_export_is_not_read(folder, tmp_path, name):
    path = shutil.copytree(folder, tmp_path / "one")
    for harmless in ("README.md", ".gitattributes", ".cache/huggingface/vae/config.json.metadata"):
        (path / harmless).parent.mkdir(parents=True, exist_ok=True)
        (path / harmless).touch()
    load(path)
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("{}")
    assert f"{path / name} is not of the export" in refused(path)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "vae/../../x", "", "a\0b"])
def test_a_folder_states_digests_of_its_own_files_alone(folder, tmp_path, name):
    path = shutil.copytree(folder, tmp_path / "one")
    table = signed.table_of((path / EXPORTED).read_bytes(), indent=2)
    table["digests"][name] = "0" * 64
    (path / EXPORTED).write_text(signed.json_of(table, indent=2))
    assert "no file in it" in refused(path)


def test_what_earlier_releases_wrote_is_read(file, folder, tmp_path):
    table, weights = parts_of(file)
    del table["digests"]
    save_file(weights, tmp_path / "one.safetensors", {"emd_fast": json.dumps(table)})
    assert torch.equal(load(tmp_path / "one.safetensors").sample(3), load(file).sample(3))
    assert facts.VERSION == table["version"] == 1
