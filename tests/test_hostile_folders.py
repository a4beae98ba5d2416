"""Model folders and exports of an attacker: no code runs, nothing outside is read or written, one line says why."""

from __future__ import annotations

import json
import os
import shutil
import sys

import detector_files
import diffusers_folders
import pytest
import safetensors.torch
from watch import PROCESSES, bounded, watched

from emd_fast import EMDConfig, EMDTrainer
from emd_fast.export.pipeline import export
from emd_fast.io import paths
from emd_fast.teachers import diffusers as teachers

diffusers = pytest.importorskip("diffusers")
needs_text = pytest.mark.skipif(
    diffusers_folders.transformers_missing() is not None, reason="transformers is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

MODULE = "hostile_module_of_a_folder"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A pipeline with a VAE, and beside it what must not be copied."""
    path = tmp_path_factory.mktemp("made") / "in" / "teacher"
    diffusers_folders.dit(path)
    (path.parent / "secret").mkdir()
    (path.parent / "secret" / "key").write_text("secret")
    (path.parent / f"{MODULE}.py").write_text("raise SystemError('imported')")
    teachers.load(path)
    return path


@pytest.fixture
def teacher(good, tmp_path):
    shutil.copytree(good.parent, tmp_path / "in")
    return tmp_path / "in" / "teacher"


def one_line(error, path):
    said = str(error.value)
    assert str(path) in said and "\n" not in said and len(said) < 900 + 2 * len(str(path)), said
    return said


def changed(name, *keys, value):
    """Sets one field of a JSON file."""

    def change(folder):
        whole = table = json.loads((folder / name).read_text())
        for key in keys[:-1]:
            table = table[key]
        table[keys[-1]] = value
        (folder / name).write_text(json.dumps(whole))

    return change


INDEX, UNET = "model_index.json", "transformer/config.json"
COMPONENT = ["diffusers", "AutoencoderKL"]
INDICES = {
    "a component above": changed(INDEX, "../payload", value=COMPONENT),
    "a component of two parts": changed(INDEX, "a/b", value=COMPONENT),
    "an absolute component": changed(INDEX, "/tmp/payload", value=COMPONENT),
    "a component of two dots": changed(INDEX, "..", value=COMPONENT),
    "a component of one dot": changed(INDEX, ".", value=COMPONENT),
    "an empty component": changed(INDEX, "", value=COMPONENT),
    "a hidden component": changed(INDEX, ".git", value=COMPONENT),
    "a component with a backslash": changed(INDEX, "..\\payload", value=COMPONENT),
    "a component with a NUL": changed(INDEX, "vae\0x", value=COMPONENT),
    "a component with a colon": changed(INDEX, "C:payload", value=COMPONENT),
    "a component with a line": changed(INDEX, "a\nb", value=COMPONENT),
    "a component of 1,000 letters": changed(INDEX, "a" * 1000, value=COMPONENT),
    "a component with an underscore": changed(INDEX, "_x", value=COMPONENT),
    "a component of one": changed(INDEX, "vae", value=["diffusers"]),
    "a component of none": changed(INDEX, "vae", value=[]),
    "a component of three": changed(INDEX, "vae", value=["diffusers", "AutoencoderKL", "x"]),
    "a component of numbers": changed(INDEX, "vae", value=[1, 2]),
    "a component of half": changed(INDEX, "vae", value=["diffusers", None]),
    "a module": changed(INDEX, "vae", value=[MODULE, "AutoencoderKL"]),
    "a module of the system": changed(INDEX, "vae", value=["os", "system"]),
    "a dotted class": changed(INDEX, "vae", value=["diffusers", "utils.os.system"]),
    "a dunder class": changed(INDEX, "vae", value=["diffusers", "__loader__"]),
    "a pipeline of its own": changed(INDEX, "_class_name", value=[MODULE, "Pipeline"]),
    "a pipeline that is a path": changed(INDEX, "_class_name", value=f"./{MODULE}"),
    "a pipeline that is a number": changed(INDEX, "_class_name", value=3),
    "an index that is a list": lambda folder: (folder / INDEX).write_text("[]"),
    "an index that is a fifo": lambda folder: ((folder / INDEX).unlink(), os.mkfifo(folder / INDEX)),
    "an index that never ends": lambda folder: ((folder / INDEX).unlink(), (folder / INDEX).symlink_to("/dev/zero")),
    "an index of brackets": lambda folder: (folder / INDEX).write_text("[" * 10**6),
    "an index that is not UTF-8": lambda folder: (folder / INDEX).write_bytes(b'{"\xff": 1}'),
    "an index of 1 TiB": lambda folder: os.truncate(folder / INDEX, 2**40),
    "a network without a class": changed(UNET, "_class_name", value=None),
    "a network that is a list": changed(UNET, "_class_name", value=["DiTTransformer2DModel"]),
    "a network that is a function": changed(UNET, "_class_name", value="is_torch_available"),
    "a network that is a module": changed(UNET, "_class_name", value="utils"),
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_is_no_index(teacher, name):
    INDICES[name](teacher)
    with watched(), pytest.raises(ValueError) as error:
        teachers.load(teacher)
    one_line(error, teacher)


CLASSES = {
    "a VAE that is a function": changed(INDEX, "vae", value=["diffusers", "is_torch_available"]),
    "a VAE that is a module": changed(INDEX, "vae", value=["diffusers", "utils"]),
    "a VAE that is a pipeline": changed(INDEX, "vae", value=["diffusers", "DiffusionPipeline"]),
    "a VAE of transformers": changed(INDEX, "vae", value=["transformers", "AutoModel"]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_a_vae_of_another_class_is_not_made(teacher, name):
    CLASSES[name](teacher)
    loaded = teachers.load(teacher)
    with watched(), pytest.raises(ValueError) as error:
        loaded.folder.decode(diffusers_folders.torch.zeros(1, 4, 8, 8))
    one_line(error, teacher)


TEXT = {
    "an automatic tokenizer": changed(INDEX, "tokenizer", value=["transformers", "AutoTokenizer"]),
    "an automatic encoder": changed(INDEX, "text_encoder", value=["transformers", "AutoModel"]),
    "an encoder that is a function": changed(INDEX, "text_encoder", value=["transformers", "pipeline"]),
    "a second encoder": changed(INDEX, "text_encoder_2", value=["diffusers", "CLIPTextModel"]),
    "a scheduler of transformers": changed(INDEX, "scheduler", value=["transformers", "PNDMScheduler"]),
    "a scheduler that is a function": changed(INDEX, "scheduler", value=["diffusers", "is_torch_available"]),
    "another pipeline": changed(INDEX, "_class_name", value="DiffusionPipeline"),
    "a pipeline that is a function": changed(INDEX, "_class_name", value="is_torch_available"),
    "no pipeline": changed(INDEX, "_class_name", value=None),
}


@needs_text
def test_text_encoders_of_another_class_are_not_made(tmp_path):
    made = diffusers_folders.stable_diffusion(tmp_path / "made")
    for i, change in enumerate(TEXT.values()):
        folder = shutil.copytree(made, tmp_path / f"copy-{i}")
        change(folder)
        loaded = teachers.load(folder)
        with watched(), pytest.raises(ValueError) as error:
            loaded.encode(["a"])
        one_line(error, folder)


# CLIP models and weights --------------------------------------------------------------------------------------------


def auto_map(name):
    """Names a class of a module that lies in the folder, as transformers' own custom code does."""

    def change(folder):
        path = folder / name
        table = json.loads(path.read_text()) if path.exists() else {}
        kinds = (
            "AutoConfig",
            "AutoModel",
            "AutoProcessor",
            "AutoTokenizer",
            "AutoImageProcessor",
            "AutoFeatureExtractor",
        )
        table["auto_map"] = dict.fromkeys(kinds, f"{MODULE}.Runs")
        table["auto_map"]["AutoTokenizer"] = [f"{MODULE}.Runs"] * 2
        own = ("processor_class", "tokenizer_class", "image_processor_type")
        table |= {key: "Runs" for key in own if key in table}
        path.write_text(json.dumps(table))
        (folder / f"{MODULE}.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass Runs: pass\n")

    return change


def pickled(name, weights):
    def change(folder):
        next(folder.glob(weights)).unlink()
        diffusers_folders.torch.save({"a": Runs()}, folder / name)

    return change


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


CLIPS = {
    "a model with code": auto_map("config.json"),
    "a tokenizer with code": auto_map("tokenizer_config.json"),
    "an image processor with code": auto_map("preprocessor_config.json"),
    "a processor with code": auto_map("processor_config.json"),
    "weights that run": pickled("pytorch_model.bin", "*.safetensors"),
    "weights that are a fifo": lambda folder: os.mkfifo(folder / "pytorch_model.bin"),
    "a configuration that never ends": lambda folder: (
        (folder / "config.json").unlink(),
        (folder / "config.json").symlink_to("/dev/zero"),
    ),
    "a configuration of brackets": lambda folder: (folder / "config.json").write_text("[" * 10**6),
    "a configuration of text": lambda folder: (folder / "config.json").write_text('"x"'),
    "sizes of text": changed("config.json", "text_config", "hidden_size", value="x"),
    "a configuration of numbers": changed("config.json", "text_config", value=3),
    "layers of 10^7": changed("config.json", "text_config", "num_hidden_layers", value=10**7),
    "layers of the other": changed("config.json", "vision_config", "num_hidden_layers", value=10**7),
    "sizes of 2^19": changed("config.json", "text_config", "hidden_size", value=2**19),
    "words of 10^12": changed("config.json", "text_config", "vocab_size", value=10**12),
    "weights that are missing": lambda folder: renamed(folder / "model.safetensors", "text_projection.weight"),
}
ENCODERS = {
    "layers of 10^7": changed("text_encoder/config.json", "num_hidden_layers", value=10**7),
    "sizes of 2^19": changed("text_encoder/config.json", "hidden_size", value=2**19),
    "sizes of text": changed("text_encoder/config.json", "hidden_size", value="8"),
    "a configuration of a list": lambda folder: (folder / "text_encoder" / "config.json").write_text("[]"),
    "an encoder with code": lambda folder: auto_map("config.json")(folder / "text_encoder"),
    "weights that run": lambda folder: pickled("pytorch_model.bin", "*.safetensors")(folder / "text_encoder"),
    "weights that are missing": lambda folder: renamed(
        folder / "text_encoder" / "model.safetensors", "final_layer_norm.weight"
    ),
    "a tokenizer that is a fifo": lambda folder: os.mkfifo(folder / "tokenizer" / "added_tokens.json"),
}


def renamed(path, ending):
    """Renames a weight, so that it is missing."""
    weights = safetensors.torch.load_file(path)
    name = next(name for name in weights if name.endswith(ending))
    weights["another"] = weights.pop(name)
    safetensors.torch.save_file(weights, path, {"format": "pt"})


@needs_text
@pytest.mark.parametrize("name", ENCODERS)
def test_text_encoders_that_lie(tmp_path, monkeypatch, name):
    loaded = teachers.load(diffusers_folders.stable_diffusion(tmp_path / "teacher"))
    monkeypatch.chdir(tmp_path)
    ENCODERS[name](tmp_path / "teacher")
    with watched(PROCESSES), bounded(300, seconds=60), pytest.raises(ValueError) as error:
        loaded.encode(["a"])
    one_line(error, tmp_path / "teacher")
    assert not list(tmp_path.rglob("ran"))


@needs_text
@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_folder_runs_no_code_and_asks_nothing(tmp_path, monkeypatch, name):
    from emd_fast.metrics.clip import ClipScore

    folder = detector_files.clip(tmp_path / "clip")
    CLIPS[name](folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with watched(PROCESSES):
        try:
            ClipScore(folder)  # a model without its code is the class of transformers
        except ValueError as error:
            assert "holds no CLIP model" in str(error) and "\n" not in str(error)
        else:
            assert "code" in name
    assert not (folder / "ran").exists() and not [name for name in sys.modules if MODULE in name]


@pytest.mark.parametrize("name", ["channels of 2^19", "more layers than weights"])
def test_a_network_larger_than_its_weights_is_not_allocated(teacher, name):
    """More layers are found by the names of the weights: a few more parameters may fit into the bytes of a file."""
    CONFIGS[name](teacher)
    with pytest.raises(
        ValueError, match="parameters, the files have" if "2^19" in name else "is missing or does not fit"
    ):
        teachers.load(teacher)


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_weights_of_a_component_run_nothing(teacher, monkeypatch, component):
    pickled("diffusion_pytorch_model.bin", "*.safetensors")(teacher / component)
    monkeypatch.chdir(teacher)
    with watched(PROCESSES), pytest.raises(ValueError) as error:
        teachers.load(teacher).folder.decode(diffusers_folders.torch.zeros(1, 4, 8, 8))
    one_line(error, teacher)
    assert not (teacher / "ran").exists()


CONFIGS = {
    "layers of 10^7": changed(UNET, "num_layers", value=10**7),
    "channels of 10^9": changed(UNET, "attention_head_dim", value=10**9),
    "channels of 2^19": changed(UNET, "attention_head_dim", value=2**19),
    "layers of text": changed(UNET, "num_layers", value="2"),
    "a number of 400 digits": changed(UNET, "in_channels", value=10**400),
    "a list of a million": changed(UNET, "in_channels", value=[1] * 10**6),
    "a size of text": changed(UNET, "sample_size", value="8"),
    "a negative size": changed(UNET, "sample_size", value=-8),
    "code": changed(UNET, "auto_map", value={"AutoModel": f"{MODULE}.Runs"}),
    "a quantization": changed(UNET, "quantization_config", value={"quant_method": "quanto"}),
    "more layers than weights": changed(UNET, "num_layers", value=3),
    "weights cut off": lambda folder: os.truncate(folder / "transformer/diffusion_pytorch_model.safetensors", 3000),
    "a configuration that is a fifo": lambda folder: ((folder / UNET).unlink(), os.mkfifo(folder / UNET)),
    "weights that are a fifo": lambda folder: os.mkfifo(folder / "transformer/diffusion_pytorch_model.bin"),
}
SCHEDULERS = {
    "no class": ("_class_name", None),
    "a class that is a list": ("_class_name", ["DDIMScheduler"]),
    "betas of text": ("beta_start", "x"),
    "betas of nothing": ("beta_end", None),
    "a trained beta of text": ("trained_betas", ["x", "y"]),
    "trained betas of text": ("trained_betas", "xyz"),
    "negative betas": ("trained_betas", [-1.0, 2.0]),
    "betas that are no numbers": ("trained_betas", [float("nan")] * 4),
    "steps of text": ("num_train_timesteps", "1000"),
    "steps of 10^12": ("num_train_timesteps", 10**12),
    "no steps": ("num_train_timesteps", 0),
    "a kind that is a table": ("beta_schedule", {"a": 1}),
    "a prediction that is a list": ("prediction_type", ["epsilon"]),
}


@pytest.mark.parametrize("name", [*CONFIGS, *SCHEDULERS])
def test_a_model_folder_that_lies(teacher, name):
    if name in CONFIGS:
        CONFIGS[name](teacher)
    else:
        key, value = SCHEDULERS[name]
        changed("scheduler/scheduler_config.json", key, value=value)(teacher)
    with watched(PROCESSES), bounded(200), pytest.raises(ValueError) as error:
        teachers.load(teacher)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900


# Exports ------------------------------------------------------------------------------------------------------------


def linked(name, target):
    def change(folder):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.symlink_to(target)

    return change


LINKS = {
    "a component that is a link out": linked("vae", "../secret"),
    "a component that is an absolute link": linked("vae", "/etc"),
    "a component that is the folder": linked("vae", "."),
    "a component that is missing": lambda folder: shutil.rmtree(folder / "vae"),
    "a component that is a file": lambda folder: (shutil.rmtree(folder / "vae"), (folder / "vae").write_text("x")),
    "a file that is a link out": linked("vae/key", "../../secret/key"),
    "a file that is a long link out": linked("vae/key", "/etc/passwd"),
    "a folder that is a link out": linked("vae/more", "../../secret"),
    "a link to a link out": lambda folder: (linked("a", "../secret")(folder), linked("vae/b", "../a")(folder)),
    "a link in a circle": linked("vae/again", "../vae"),
    "a link to itself": linked("vae/self", "self"),
    "a link to nowhere": linked("vae/nothing", "nowhere"),
    "a device": linked("vae/zero", "/dev/zero"),
    "a fifo": lambda folder: os.mkfifo(folder / "vae" / "fifo"),
}


@pytest.mark.parametrize("name", LINKS)
def test_an_export_does_not_follow_links_out(teacher, tmp_path, name):
    trainer = EMDTrainer(teachers.load(teacher), EMDConfig(steps=1, batch_size=2, num_classes=10, t_star=0.6))
    LINKS[name](teacher)
    before = sorted(path for path in tmp_path.rglob("*"))
    (tmp_path / "out").mkdir()
    with pytest.raises((ValueError, OSError)) as error:
        export(trainer, tmp_path / "out" / "x")
    one_line(error, teacher)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "out").rmdir()
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_links_inside_the_folder_and_into_the_cache_of_the_hub_are_copied(teacher, tmp_path):
    trainer = EMDTrainer(teachers.load(teacher), EMDConfig(steps=1, batch_size=2, num_classes=10, t_star=0.6))
    linked("vae/inside", "../model_index.json")(teacher)
    made = export(trainer, tmp_path / "x")
    assert (made / "vae" / "inside").read_text() == (teacher / INDEX).read_text()
    assert not (made / "vae" / "inside").is_symlink()
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    shutil.copytree(teacher, hub / "snapshots" / "0", symlinks=True)
    config = hub / "snapshots" / "0" / "vae" / "config.json"
    config.rename(hub / "blobs" / "1")
    config.symlink_to("../../../blobs/1")
    trainer = EMDTrainer(teachers.load(hub / "snapshots" / "0"), trainer.config)
    assert (export(trainer, tmp_path / "y") / "vae" / "config.json").read_text() == (hub / "blobs" / "1").read_text()


@pytest.mark.parametrize("name", ["", ".", "..", "/a", "a/b", "a\\b", "a\0", "a:b", "a\n", ".a", "-a", "é", None, 3])
def test_names_that_are_no_single_part(name):
    assert not paths.is_part(name)
    assert paths.is_part("text_encoder_2") and paths.is_part("x-1.bin")
