"""Model folders and exports of an attacker: no code runs, nothing outside is read or written, one line says why."""

import json
import os
import shutil
import sys

import detector_files
import diffusers_folders
import pytest
import safetensors.torch
from watch import PROCESSES, Runs, at, bounded, one_line, watched

from emd_fast import EMDConfig, EMDTrainer
from emd_fast.export.pipeline import export
from emd_fast.io import paths
from emd_fast.teachers import diffusers as teachers

diffusers = pytest.importorskip("diffusers")
needs_text = pytest.mark.skipif(diffusers_folders.transformers_missing() is not None, reason="needs transformers")
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


def changed(name, *keys, value):
    """Sets one field of a JSON file."""

    def change(folder):
        table = json.loads((folder / name).read_text())
        at(*keys, value=value)(table)
        (folder / name).write_text(json.dumps(table))

    return change


def wrong(name, table, *prefix):
    """{name: change} of {field of a JSON file: wrong values}."""
    return {
        f"{field}-{i}": changed(name, *prefix, field, value=value)
        for field, values in table.items()
        for i, value in enumerate(values)
    }


def instead(name, target=None):
    """A fifo, or a link to what never ends, in the place of a file."""

    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name) if target is None else (folder / name).symlink_to(target)

    return change


INDEX, UNET = "model_index.json", "transformer/config.json"
COMPONENTS = [*"../payload a/b /tmp/payload .. . .git ..\\payload C:payload _x".split(), "", "vae\0x", "a\nb"]
INDICES = {
    **{f"component {name!r}": changed(INDEX, name, value=["diffusers", "AutoencoderKL"]) for name in COMPONENTS},
    "a component of 1,000 letters": changed(INDEX, "a" * 1000, value=["diffusers", "AutoencoderKL"]),
    **wrong(INDEX, {
        "vae": [
            ["diffusers"], [], ["diffusers", "AutoencoderKL", "x"], [1, 2], ["diffusers", None],
            [MODULE, "AutoencoderKL"], ["os", "system"], ["diffusers", "utils.os.system"], ["diffusers", "__loader__"],
        ],
        "_class_name": [[MODULE, "Pipeline"], f"./{MODULE}", 3],
    }),
    "an index that is a list": lambda folder: (folder / INDEX).write_text("[]"),
    "an index that is a fifo": instead(INDEX),
    "an index that never ends": instead(INDEX, "/dev/zero"),
    "an index of brackets": lambda folder: (folder / INDEX).write_text("[" * 10**6),
    "an index that is not UTF-8": lambda folder: (folder / INDEX).write_bytes(b'{"\xff": 1}'),
    "an index of 1 TiB": lambda folder: os.truncate(folder / INDEX, 2**40),
    **{f"network {i}": changed(UNET, "_class_name", value=value) for i, value in enumerate(
        (None, ["DiTTransformer2DModel"], "is_torch_available", "utils")
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_is_no_index(teacher, name):
    INDICES[name](teacher)
    with watched(), pytest.raises(ValueError) as error:
        teachers.load(teacher)
    one_line(error, teacher)


VAES = ["diffusers is_torch_available", "diffusers utils", "diffusers DiffusionPipeline", "transformers AutoModel"]


@pytest.mark.parametrize("vae", VAES)
def test_a_vae_of_another_class_is_not_made(teacher, vae):
    changed(INDEX, "vae", value=vae.split())(teacher)
    loaded = teachers.load(teacher)
    with watched(), pytest.raises(ValueError) as error:
        loaded.folder.decode(diffusers_folders.torch.zeros(1, 4, 8, 8))
    one_line(error, teacher)


TEXT = wrong(INDEX, {
    "tokenizer": [["transformers", "AutoTokenizer"]],
    "text_encoder": [["transformers", "AutoModel"], ["transformers", "pipeline"]],
    "text_encoder_2": [["diffusers", "CLIPTextModel"]],
    "scheduler": [["transformers", "PNDMScheduler"], ["diffusers", "is_torch_available"]],
    "_class_name": ["DiffusionPipeline", "is_torch_available", None],
})  # fmt: skip


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


def auto_map(name):
    """Names a class of a module that lies in the folder, as transformers' own custom code does."""

    def change(folder):
        path = folder / name
        table = json.loads(path.read_text()) if path.exists() else {}
        kinds = "Config Model Processor Tokenizer ImageProcessor FeatureExtractor".split()
        table["auto_map"] = {f"Auto{kind}": f"{MODULE}.Runs" for kind in kinds}
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


def adapter(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/", "peft_type": "LORA"}')


KERNEL = "kernels-community/of-an-attacker"  # transformers would download and import it
CLIPS = {
    **wrong("config.json", {"attn_implementation": [KERNEL, {"text_config": KERNEL}]}),
    **wrong("config.json", {"_attn_implementation": [KERNEL], "auto_map": [{"AutoModel": "x.Y"}]}, "text_config"),
    "weights of another name": changed("config.json", "transformers_weights", value="../model.safetensors"),
    "an adapter of another model": adapter,
    "a model with code": auto_map("config.json"),
    "a tokenizer with code": auto_map("tokenizer_config.json"),
    "an image processor with code": auto_map("preprocessor_config.json"),
    "a processor with code": auto_map("processor_config.json"),
    "weights that run": pickled("pytorch_model.bin", "*.safetensors"),
    "weights that are a fifo": instead("pytorch_model.bin"),
    "a configuration that never ends": instead("config.json", "/dev/zero"),
    "a configuration of brackets": lambda folder: (folder / "config.json").write_text("[" * 10**6),
    "a configuration of text": lambda folder: (folder / "config.json").write_text('"x"'),
    **wrong("config.json", {"hidden_size": ["x", 2**19], "num_hidden_layers": [10**7]}, "text_config"),
    "words of 10^12": changed("config.json", "text_config", "vocab_size", value=10**12),
    "a configuration of numbers": changed("config.json", "text_config", value=3),
    "layers of the other": changed("config.json", "vision_config", "num_hidden_layers", value=10**7),
    "weights that are missing": lambda folder: renamed(folder / "model.safetensors", "text_projection.weight"),
}  # fmt: skip
ENCODERS = {
    **wrong(
        "text_encoder/config.json", {"_attn_implementation": [KERNEL], "attn_implementation": ["flash_attention_2"]}
    ),
    "an adapter of another model": lambda folder: adapter(folder / "text_encoder"),
    **wrong("text_encoder/config.json", {"num_hidden_layers": [10**7], "hidden_size": [2**19, "8"]}),
    "a configuration of a list": lambda folder: (folder / "text_encoder" / "config.json").write_text("[]"),
    "an encoder with code": lambda folder: auto_map("config.json")(folder / "text_encoder"),
    "weights that run": lambda folder: pickled("pytorch_model.bin", "*.safetensors")(folder / "text_encoder"),
    "weights missing": lambda folder: renamed(folder / "text_encoder/model.safetensors", "final_layer_norm.weight"),
    "a tokenizer that is a fifo": instead("tokenizer/added_tokens.json"),
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


@pytest.mark.parametrize(
    ("name", "said"),
    [("attention_head_dim-1", "parameters, the files have"), ("num_layers-2", r"19 tensors are missing \(")],
)
def test_a_network_larger_than_its_weights_is_not_allocated(teacher, name, said):
    CONFIGS[name](teacher)
    with pytest.raises(ValueError, match=said):
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
    **wrong(UNET, {
        "num_layers": [10**7, "2", 3], "attention_head_dim": [10**9, 2**19], "in_channels": [10**400, [1] * 10**6],
        "sample_size": ["8", -8], "auto_map": [{"AutoModel": f"{MODULE}.Runs"}],
        "quantization_config": [{"quant_method": "quanto"}],
    }),
    **wrong("scheduler/scheduler_config.json", {
        "_class_name": [None, ["DDIMScheduler"]], "beta_start": ["x"], "beta_end": [None],
        "trained_betas": [["x", "y"], "xyz", [-1.0, 2.0], [float("nan")] * 4], "beta_schedule": [{"a": 1}],
        "num_train_timesteps": ["1000", 10**12, 0], "prediction_type": [["epsilon"]],
    }),
    "weights cut off": lambda folder: os.truncate(folder / "transformer/diffusion_pytorch_model.safetensors", 3000),
    "a configuration that is a fifo": instead(UNET),
    "weights that are a fifo": instead("transformer/diffusion_pytorch_model.bin"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_folder_that_lies(teacher, name):
    CONFIGS[name](teacher)
    with watched(PROCESSES), bounded(200), pytest.raises(ValueError) as error:
        teachers.load(teacher)
    assert "\n" not in str(error.value) and len(str(error.value)) < 900


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
