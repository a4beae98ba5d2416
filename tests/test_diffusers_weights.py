"""Weights of diffusers folders as they are published, and those that do not fit: one line with their names."""

from __future__ import annotations

import importlib.util
import json
import shutil

import diffusers_folders as folders
import pytest
import torch

from emd_fast.config import ConfigError
from emd_fast.teachers import diffusers as teachers
from emd_fast.teachers.diffusers import weights

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")
needs_text = pytest.mark.skipif(folders.transformers_missing() is not None, reason=str(folders.transformers_missing()))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> an unchanged folder, each made once."""
    found = {}

    def make(name):
        if name not in found:
            found[name] = getattr(folders, name)(tmp_path_factory.mktemp(name) / "teacher")
        return found[name]

    return make


@pytest.fixture(params=["accelerate", "without accelerate"])
def accelerate(request, monkeypatch):
    """Both ways in which diffusers reads weights."""
    if request.param == "accelerate":
        pytest.importorskip("accelerate")
    else:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            weights.importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else find(name, *a)
        )
    assert weights.quietly() == {"low_cpu_mem_usage": request.param == "accelerate"}


def file_of(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def rewritten(folder, change):
    path = file_of(folder)
    safetensors.save_file(change(safetensors.load_file(path)), path, {"format": "pt"})


def first(table, dim=2):
    return next(name for name in sorted(table) if table[name].dim() == dim)


def without_the_first(table):
    return {name: value for name, value in table.items() if name != first(table)}


def with_another_shape(table):
    return table | {first(table): torch.zeros(3, 3)}


def prefixed(prefix):
    return lambda table: {prefix + name: value for name, value in table.items()}


# What is done to the weights -> what the refusal says.
WRONG = {
    "missing": (without_the_first, ["1 tensor is missing (", "give the weights that belong to its config.json"]),
    "unexpected": (lambda table: table | {"extra.b": torch.ones(2)}, ["1 tensor is unexpected (extra.b)"]),
    "shape": (with_another_shape, ["1 tensor is of another shape (", " is (3, 3), not ("]),
    "module": (prefixed("module."), [" tensors are missing (", ", ...)", "begin with 'module.' (DataParallel"]),
    "compiled": (prefixed("_orig_mod."), ["begin with '_orig_mod.' (torch.compile"]),
    "several": (
        lambda table: {**without_the_first(table), "a.b": torch.ones(1), "a.c": torch.ones(1)},
        ["1 tensor is missing (", "2 tensors are unexpected (a.b, a.c)"],
    ),
}


def read(part, folder):
    teacher = teachers.load(folder)
    return teacher.encode(["a b"]) if part == "text_encoder" else teacher.decode(torch.ones(1, 4, 8, 8))


@pytest.mark.parametrize("change", WRONG)
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("dit", "transformer"),
        ("dit", "vae"),
        pytest.param("stable_diffusion", "text_encoder", marks=needs_text),
    ],
)
def test_weights_that_do_not_fit_are_named(made, accelerate, tmp_path, capfd, kind, part, change):
    folder = shutil.copytree(made(kind), tmp_path / "copy")
    rewrite, said = WRONG[change]
    rewritten(folder / part, rewrite)
    capfd.readouterr()
    with pytest.raises(ConfigError) as error:
        read(part, folder)
    text = str(error.value)
    assert f"the weights in {folder / part} do not fit its config.json" in text, text
    assert all(words in text for words in said), text
    assert "\n" not in text and len(text) < 900 + len(str(folder))
    assert "newly initialized" not in "".join(capfd.readouterr())


def old_attention(table):
    """The names that Stable Diffusion's own VAE has."""
    to = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name):
        for new, old in to.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return name

    return {renamed(name): value for name, value in table.items()}


def old_encoder(table):
    """The names and the buffer of encoders that older versions of transformers wrote."""
    return {f"text_model.{name.removeprefix('text_model.')}": value for name, value in table.items()} | {
        "text_model.embeddings.position_ids": torch.arange(12)[None]
    }


@pytest.mark.parametrize(
    ("kind", "part", "change"),
    [
        ("dit", "vae", old_attention),
        pytest.param("stable_diffusion", "text_encoder", old_encoder, marks=needs_text),
    ],
)
def test_names_of_older_versions_are_accepted(made, accelerate, tmp_path, kind, part, change):
    folder = shutil.copytree(made(kind), tmp_path / "copy")
    before = sorted(safetensors.load_file(file_of(folder / part)))
    rewritten(folder / part, change)
    assert sorted(safetensors.load_file(file_of(folder / part))) != before
    assert torch.equal(read(part, folder), read(part, made(kind)))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_quantized_weights_are_refused(made, tmp_path, part):
    folder = shutil.copytree(made("dit"), tmp_path / "copy")
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    with pytest.raises(ConfigError, match="its configuration has quantization_config, which is not supported"):
        read(part, folder)
