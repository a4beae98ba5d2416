"""Weights of diffusers folders as they are published, and those that do not fit: one line with their names."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil

import detector_files
import diffusers_folders as folders
import pytest
import torch
from watch import PROCESSES, Runs, one_line, watched

from emd_fast.config import ConfigError
from emd_fast.io import models
from emd_fast.metrics.clip import ClipScore
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


def as_dtype(dtype, save=None):
    """Weights times ten in another dtype, in a file of safetensors or of torch."""

    def rewrite(folder):
        path = file_of(folder)
        table = {name: (value * 10).to(dtype) for name, value in safetensors.load_file(path).items()}
        if save is None:
            return safetensors.save_file(table, path, {"format": "pt"})
        path.unlink()
        return torch.save(
            save(table), folder / (path.stem.replace("model", "pytorch_model", path.stem == "model") + ".bin")
        )

    return rewrite


def as_index(change):
    """Two shards and an index with something changed."""

    def rewrite(folder):
        saved_again(sharded("safetensors"))(folder)
        (path,) = folder.glob("*.index.json")
        table = change(folder, json.loads(path.read_text()))
        path.write_text(json.dumps(table)) if table is not None else os.truncate(path, 2**40)

    return rewrite


def twice(folder, index):
    one, other = sorted(folder.glob("*.safetensors"))
    name = min(safetensors.load_file(one))
    safetensors.save_file({**safetensors.load_file(other), name: torch.ones(1)}, other, {"format": "pt"})
    return index


def outside(folder, index):
    return {"metadata": {}, "weight_map": dict.fromkeys(index["weight_map"], "../model.safetensors")}


def without_a_shard(folder, index):
    min(folder.glob("*.safetensors")).unlink()
    return index


def infinite(folder):
    rewritten(folder, lambda table: table | {first(table): table[first(table)] / 0})


# What is done to the files -> what the refusal says.
FILES = {
    "int8": (as_dtype(torch.int8), "is of I8: give weights of floating-point numbers"),
    "bool": (as_dtype(torch.bool), "is of BOOL: give weights"),
    "complex": (as_dtype(torch.complex64), "is of C64: give weights"),
    "int8 of torch": (as_dtype(torch.int8, dict), "is of int8: give weights"),
    "a list of torch": (as_dtype(torch.float32, lambda table: [table]), "holds a list, no table of tensors"),
    "a number of torch": (as_dtype(torch.float32, lambda table: {**table, "a": 3}), "holds 'a', a int and no tensor"),
    "code of torch": (as_dtype(torch.float32, lambda table: {**table, "a": Runs()}), "asks for posix.system: refused"),
    "not finite": (infinite, r"1 tensor is not finite \("),
    "twice": (as_index(twice), r" is in \S*-00001-of-00002.safetensors and in \S*-00002-of-00002.safetensors: remove"),
    "a shard outside": (as_index(outside), "names the file '../model.safetensors', which is none in its folder"),
    "a shard that is missing": (as_index(without_a_shard), "there is no file .*, which its index names"),
    "an index of 1 TiB": (as_index(lambda *_: None), "it has 1,099,511,627,776 bytes, at most"),
    "an index that is a list": (as_index(lambda *_: [1]), "it is no index of shards"),
    "an index without a table": (as_index(lambda *_: {"metadata": {}}), "it is no index of shards"),
}  # fmt: skip


@pytest.mark.parametrize("change", FILES)
@pytest.mark.parametrize("part", ["vae", pytest.param("text_encoder", marks=needs_text)])
def test_files_that_hold_no_weights_are_named(made, tmp_path, capfd, part, change):
    folder = shutil.copytree(made("stable_diffusion" if part == "text_encoder" else "dit"), tmp_path / "copy")
    rewrite, said = FILES[change]
    rewrite(folder / part)
    capfd.readouterr()
    with watched(PROCESSES), pytest.raises(ConfigError, match=said) as error:
        read(part, folder)
    one_line(error, folder / part)
    assert not any(capfd.readouterr())  # no bar of progress either


@needs_text
@pytest.mark.parametrize("change", [name for name in FILES if name != "a shard outside"])
def test_files_of_clip_that_hold_no_weights_are_named(tmp_path, change):
    folder = detector_files.clip(tmp_path / "clip")
    rewrite, said = FILES[change]
    rewrite(folder)
    with watched(PROCESSES), pytest.raises(ValueError, match=said) as error:
        ClipScore(folder)
    one_line(error, folder)


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


# Files as they are published ---------------------------------------------------------------------------------------


def saved_again(change):
    """Writes the weights of a folder in another form."""

    def rewrite(folder):
        path = file_of(folder)
        table = safetensors.load_file(path)
        path.unlink()
        change(folder, "pytorch_model" if path.stem == "model" else path.stem, path.stem, table)

    return rewrite


def fp16_alone(folder, bin_stem, stem, table):
    half = {name: value.half() if value.is_floating_point() else value for name, value in table.items()}
    safetensors.save_file(half, folder / f"{stem}.fp16.safetensors", {"format": "pt"})


def sharded(suffix, variant=""):
    def write(folder, bin_stem, stem, table):
        stem, names = (bin_stem if suffix == "bin" else stem), sorted(table)
        placed = {}
        for i, part in enumerate((names[::2], names[1::2])):
            name = f"{stem}{variant}-0000{i + 1}-of-00002.{suffix}"
            tensors = {key: table[key].contiguous() for key in part}
            if suffix == "bin":
                torch.save(tensors, folder / name)
            else:
                safetensors.save_file(tensors, folder / name, {"format": "pt"})
            placed |= dict.fromkeys(part, name)
        index = {"metadata": {"total_size": 1}, "weight_map": placed}
        (folder / f"{stem}.{suffix}.index{variant}.json").write_text(json.dumps(index))

    return write


def bin_alone(folder, bin_stem, stem, table):
    torch.save(table, folder / f"{bin_stem}.bin")


def two_variants(folder, bin_stem, stem, table):
    for variant in ("non_ema", "fp16"):
        value = table if variant == "fp16" else {name: torch.zeros_like(value) for name, value in table.items()}
        safetensors.save_file(value, folder / f"{stem}.{variant}.safetensors", {"format": "pt"})


FORMS = {
    "fp16 alone": fp16_alone,
    "shards": sharded("safetensors"),
    "shards of a variant": sharded("safetensors", ".fp16"),
    ".bin": bin_alone,
    ".bin in shards": sharded("bin"),
    "fp16 beside others": two_variants,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kind", "part"),
    [("dit", "transformer"), ("dit", "vae"), pytest.param("stable_diffusion", "text_encoder", marks=needs_text)],
)
def test_weights_in_the_forms_that_diffusers_publishes(made, accelerate, tmp_path, kind, part, form):
    folder = shutil.copytree(made(kind), tmp_path / "copy")
    saved_again(FORMS[form])(folder / part)
    tolerance = {"rtol": 0, "atol": 0 if form != "fp16 alone" else 2e-2}
    if part == "transformer":
        ours, theirs = (teachers.load(path).network.state_dict() for path in (folder, made(kind)))
        assert {value.dtype for value in ours.values()} == {torch.float32}
        torch.testing.assert_close(ours, theirs, **tolerance)
    else:
        torch.testing.assert_close(read(part, folder), read(part, made(kind)), **tolerance)


def others(folder, bin_stem, stem, table):
    for variant in ("non_ema", "ema"):
        safetensors.save_file(table, folder / f"{stem}.{variant}.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda folder, *_: (folder / "model.onnx").write_bytes(b"x"),
            "no weights of a known name (config.json, model",
        ),
        (
            lambda folder, *_: (folder / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(b"x"),
            "shards without their .index.json",
        ),
        (others, "weights of several variants, diffusion_pytorch_model.ema.safetensors, "),
    ],
)
def test_files_that_are_not_read_are_named(made, tmp_path, change, said):
    folder = shutil.copytree(made("dit"), tmp_path / "copy")
    saved_again(change)(folder / "transformer")
    with pytest.raises(ConfigError) as error:
        teachers.load(folder)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_an_export_gives_weights_of_a_variant_the_plain_name(made, tmp_path):
    from emd_fast import EMDConfig, EMDTrainer
    from emd_fast.export import export, load

    folder = shutil.copytree(made("dit"), tmp_path / "copy")
    saved_again(fp16_alone)(folder / "vae")
    teacher = teachers.load(folder)
    config = EMDConfig(steps=1, batch_size=2, num_classes=10, t_star=teacher.time(300), input_scale=1.0)
    out = export(EMDTrainer(teacher, config), tmp_path / "out")
    latents = torch.ones(1, 4, 8, 8)
    assert torch.equal(load(out).decode(latents), teacher.decode(latents))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out)  # without `variant`
    assert {parameter.dtype for parameter in pipeline.vae.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32])
def test_values_of_every_width_are_looked_at(dtype):
    models.check_finite([("a", torch.ones(2).to(dtype))])
    with pytest.raises(ValueError, match=r"1 tensor is not finite \(b\)"):
        models.check_finite([("a", torch.ones(2).to(dtype)), ("b", torch.tensor([float("nan")]).to(dtype))])
