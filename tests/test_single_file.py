"""Teachers whose weights are in one .safetensors file, described by a folder."""

import json
import shutil

import pytest
import safetensors.torch as safetensors
import torch

pytest.importorskip("diffusers")
import architectures
import diffusers_folders as folders
import single_files as files
import tiny_architectures

from emd_fast.config import ConfigError
from emd_fast.teachers import diffusers as teachers
from emd_fast.teachers.diffusers.folder import Folder
from emd_fast.teachers.diffusers.single_file import SingleFile

needs_text = pytest.mark.skipif(folders.transformers_missing() is not None, reason="transformers is not installed")
TINY = "--t-star=0.6 --steps=2 --batch-size=4 --langevin-steps=1 --fake-score-warmup=0 --precision=float32".split()
WEIGHTS = ("*.safetensors", "*.bin")


def described(folder, target):
    """The configuration of a pipeline, without weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*WEIGHTS))
    return target


@pytest.fixture
def unet(tmp_path):
    """A folder with a network and its scheduler, the folder without weights, and its state dict."""
    folder = folders.bare_text_unet(tmp_path / "folder")
    config = described(folder, tmp_path / "config")
    return folder, config, folders.text_unet().state_dict()


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def state_of(folder, part):
    return safetensors.load_file(next((folder / part).glob("*.safetensors")))


@pytest.mark.parametrize("names", [files.unet, dict], ids=["original", "diffusers"])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_weights_are_those_of_the_folder(unet, tmp_path, names, stored):
    folder, config, state = unet
    extra = {"model_ema.decay": torch.ones(()), "alphas_cumprod": torch.ones(3)} if names is files.unet else {}
    table = {name: value.to(stored).contiguous() for name, value in names(state).items()}
    safetensors.save_file(table | extra, tmp_path / "x.safetensors")
    found, wanted = teachers.load(tmp_path / "x.safetensors", config=config), teachers.load(folder)
    if stored == torch.float16:
        for value in wanted.network.state_dict().values():
            value.copy_(value.half())
    assert same(found.network, wanted.network)
    assert found.trained == wanted.trained
    assert str(tmp_path / "x.safetensors") in found.source and found.folder.file.sha256 in found.source


@pytest.mark.parametrize(
    ("make", "names"),
    [(folders.bare_sd3, files.sd3), (folders.bare_sd3, dict), (folders.unet, dict), (folders.dit, dict)],
    ids=["sd3", "sd3-diffusers", "unet2d", "dit"],
)
def test_the_other_networks(tmp_path, make, names):
    folder = make(tmp_path / "folder")
    wanted = teachers.load(folder)
    table = {name: value.contiguous() for name, value in names(wanted.network.model.state_dict()).items()}
    if wanted.folder.has("vae"):
        table |= files.vae(state_of(folder, "vae"))
    safetensors.save_file(table, tmp_path / "x.safetensors")
    found = teachers.load(tmp_path / "x.safetensors", config=described(folder, tmp_path / "config"))
    assert same(found.network, wanted.network)
    if wanted.folder.has("vae"):
        assert same(found.folder.vae(), wanted.folder.vae())


@pytest.mark.parametrize("name", architectures.ROWS)
def test_every_network_by_the_names_of_diffusers(tmp_path, name):
    row = architectures.ROWS[name]
    model = tiny_architectures.seeded(row.model)
    config = described(folders.bare(model, row.scheduler(), tmp_path / "folder"), tmp_path / "config")
    table = {name: value.contiguous() for name, value in model.state_dict().items()}
    safetensors.save_file(table, tmp_path / "x.safetensors")
    found = Folder(config, SingleFile(tmp_path / "x.safetensors")).load_network(torch.float32)
    assert same(found.model, model)


@needs_text
@pytest.mark.parametrize("names", [files.clip, files.open_clip])
def test_a_whole_pipeline_in_one_file(tmp_path, names, call):
    folder = folders.stable_diffusion(tmp_path / "folder")
    config = described(folder, tmp_path / "config")
    parts = {name: state_of(folder, name) for name in ("unet", "vae", "text_encoder")}
    table = files.unet(parts["unet"]) | files.vae(parts["vae"]) | names(parts["text_encoder"])
    safetensors.save_file(table, tmp_path / "x.safetensors")
    wanted, found = teachers.load(folder), teachers.load(tmp_path / "x.safetensors", config=config)
    assert same(found.network, wanted.network) and same(found.folder.vae(), wanted.folder.vae())
    assert torch.equal(found.encode(["a b", "c"]), wanted.encode(["a b", "c"]))
    (tmp_path / "p.txt").write_text("a b\nc\n")
    words = ["distill", "--teacher", "x.safetensors", "--teacher-config", "config", "--prompts", "p.txt", *TINY]
    code, _, err = call(*words, "--out", "run")
    assert code == 0, err
    record = json.loads((tmp_path / "run" / "prompts.json").read_text())
    code, _, err = call("distill", "--teacher", "folder", "--prompts", "p.txt", *TINY, "--out", "other")
    assert code == 0, err
    assert call("export", "run", "exported")[0] == call("export", "other", "wanted")[0] == 0
    for part in ("unet", "vae", "text_encoder"):
        exported, other = (state_of(tmp_path / name, part) for name in ("exported", "wanted"))
        assert exported.keys() == other.keys() and all(torch.equal(exported[name], other[name]) for name in other)
    # Another file with other text encoders: its prompts are not those of this run.
    table = {name: value + 1 if name.startswith("cond_stage_model") else value for name, value in table.items()}
    safetensors.save_file(table, tmp_path / "x.safetensors")
    code, _, err = call(*words, "--steps=3", "--out", "run")
    assert code == 2 and "the text encoders are not those" in err
    assert record["encoder"] != json.loads((tmp_path / "other" / "prompts.json").read_text())["encoder"]


@needs_text
def test_what_the_file_lacks_is_of_the_folder(tmp_path):
    folder = folders.stable_diffusion(tmp_path / "folder")
    safetensors.save_file(files.unet(state_of(folder, "unet")), tmp_path / "x.safetensors")
    wanted, found = teachers.load(folder), teachers.load(tmp_path / "x.safetensors", config=folder)
    assert same(found.folder.vae(), wanted.folder.vae())
    assert torch.equal(found.encode(["a"]), wanted.encode(["a"]))
    config = described(folder, tmp_path / "config")
    with pytest.raises(ConfigError, match=r"vae has no weights of a known name"):
        teachers.load(tmp_path / "x.safetensors", config=config).folder.check(4)


RESNET = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.pop(RESNET), r"1 tensor is missing \(down_blocks\.0\.resnets\.0\.conv1\.weight\)"),
        (lambda table: table.pop("model.diffusion_model.out.2.bias"), r"1 tensor is missing \(conv_out\.bias\)"),
        (lambda table: table.update({RESNET: torch.ones(2)}), r"1 tensor is of another shape .*is \(2\), not \(8, 8"),
        (
            lambda table: table.update({"model.diffusion_model.x": torch.ones(2)}),
            r"1 tensor is unexpected \(model\.diffusion_model\.x\)",
        ),
        (lambda table: table.update({RESNET[:-6] + "x": torch.ones(2)}), r"unexpected \(down_blocks.*conv1\.x\)"),
        (lambda table: table.update({RESNET: torch.ones(8, 8, 3, 3, dtype=torch.int8)}), r"is torch\.int8"),
        (
            lambda table: table.update({f"model.diffusion_model.{i}": torch.ones(1) for i in range(500)}),
            "its config.json describes",
        ),
        (
            lambda table: [table.update({f"module.{name}": table.pop(name)}) for name in list(table)],
            "begin with 'module.'",
        ),
        (lambda table: (table.clear(), table.update(x=torch.ones(1))), "its configuration is of"),
        (
            lambda table: [table.update({name: table.pop(name) for name in list(table) if "input_blocks.2" in name})],
            None,
        ),
    ],
    ids=["missing", "end", "shape", "besides", "unknown", "dtype", "many", "prefix", "empty", "order"],
)
def test_weights_that_do_not_fit_are_named_in_one_line(unet, tmp_path, change, said):
    _, config, state = unet
    table = files.unet(state)
    change(table)
    safetensors.save_file(table, tmp_path / "x.safetensors")
    if said is None:
        teachers.load(tmp_path / "x.safetensors", config=config)
        return
    with pytest.raises(ConfigError, match=said) as error:
        teachers.load(tmp_path / "x.safetensors", config=config)
    assert "x.safetensors do not fit" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_sd3_that_lacks_a_tensor(tmp_path):
    folder = folders.bare_sd3(tmp_path / "folder")
    table = files.sd3(folders.sd3_transformer().state_dict())
    del table["model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"]
    safetensors.save_file(table, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"1 tensor is missing \(joint_blocks\.1\.x_block\.mlp\.fc1\.weight\)"):
        teachers.load(tmp_path / "x.safetensors", config=folder)


def test_what_is_no_single_file_is_one_line(unet, tmp_path, refused):
    state = unet[2]
    safetensors.save_file(files.unet(state), tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:-5])
    (tmp_path / "header.safetensors").write_bytes(content[:30] + b"\xff" + content[31:])
    torch.save({"state_dict": {}}, tmp_path / "x.ckpt")
    (tmp_path / "no").mkdir()
    given = ["--teacher-config", "config"]
    for said, *words in (
        ("x.ckpt is a pickle, which can hold code: convert it to .safetensors", "x.ckpt", *given),
        ("cannot read the single file cut.safetensors", "cut.safetensors", *given),
        ("cannot read the single file header.safetensors", "header.safetensors", *given),
        ("cannot read the single file none.safetensors: there is no such file", "none.safetensors", *given),
        ("leave --teacher-config out", "folder", *given),
        ("leave --teacher-config out", "module:function", *given),
        ("none is no folder: --teacher-config is a folder", "x.safetensors", "--teacher-config", "none"),
        ("no is no model of diffusers", "x.safetensors", "--teacher-config", "no"),
        ("give --teacher-config FOLDER", "x.safetensors"),
    ):
        refused(2, said, "distill", "--teacher", *words, "--out", "run", *TINY)


def test_a_run_notices_another_file(tmp_path, call):
    folder = folders.unet(tmp_path / "folder")
    state = state_of(folder, "unet")
    safetensors.save_file(state, tmp_path / "x.safetensors")
    words = ["distill", "--teacher", "x.safetensors", "--teacher-config", "folder", "--out", "run", *TINY]
    code, _, err = call(*words)
    assert code == 0, err
    assert call("sample", "run", "-n", 2, "--out", "x.pt")[0] == 0
    safetensors.save_file({name: value + 1 for name, value in state.items()}, tmp_path / "x.safetensors")
    code, _, err = call(*words, "--steps=3")
    assert code == 2 and "made with a teacher of other weights" in err and "x.safetensors of SHA-256" in err
