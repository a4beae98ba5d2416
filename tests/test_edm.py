"""From a checkpoint of EDM or EDM2 to a teacher: load, convert, and a distillation of it."""

import json
import math
import os

import edm_files
import numpy as np
import pytest
import torch
from helpers import assert_within
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emd_fast import EMDConfig, EMDTrainer
from emd_fast.diffusion.schedules import EDM
from emd_fast.teachers import edm

TINY = ["--steps=2", "--batch-size=4", "--langevin-steps=2", "--samples=4", "--log-every=1", "--precision=float32"]


@pytest.fixture(scope="module")
def pickled(tmp_path_factory):
    """name -> path of that network's checkpoint."""
    folder = tmp_path_factory.mktemp("edm")

    def of(name):
        path = folder / f"{name}.pkl"
        if not path.exists():
            path.write_bytes(edm_files.file_of(name))
        return path

    return of


def saved_with(tmp_path, name, change=None, protocol=4, **kwargs):
    """A checkpoint of that network with other arguments, and its modules changed by `change`."""
    wrapper, network, own = edm_files.network_of(name)
    saved = edm_files.wrapped(network, kwargs.pop("wrapper", wrapper), **{**own, **kwargs})
    if change is not None:
        change(saved)
    path = tmp_path / "file.pkl"
    path.write_bytes(edm_files.dumps(saved, protocol))
    return path


@pytest.mark.parametrize("name", edm_files.NETWORKS)
def test_the_denoiser(name, pickled):
    denoiser = edm.load(pickled(name))
    classes = edm_files.NETWORKS[name][2].get("label_dim", 0)
    assert denoiser.sample_shape == (3, 8, 8) and denoiser.schedule == EDM() and not denoiser.training
    assert denoiser.null_cond == (classes or None)
    assert denoiser.parametrization == ("eps" if name in ("vp", "ve", "iddpm") else "edm")
    x, sigma, labels = edm_files.image(4)
    labels = labels if classes else None
    # The score is that of D by Tweedie's formula, whatever the parametrization.
    tweedie = (denoiser.denoise(x, sigma, labels) - x) / sigma[:, None, None, None] ** 2
    score = denoiser.score(x, sigma, labels)
    assert_within(score * sigma[:, None, None, None], tweedie * sigma[:, None, None, None], 1e-3, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, pickled):
    denoiser = edm.load(pickled("ncsnpp"), dtype=dtype)
    assert {p.dtype for p in denoiser.parameters()} == {dtype}
    assert {b.dtype for b in denoiser.buffers()} == {torch.float32}
    x, sigma, _ = edm_files.image()
    with torch.no_grad():
        found, expected = (d.denoise(x, sigma) for d in (denoiser, edm.load(pickled("ncsnpp"))))
    assert_within(found, expected, {torch.float32: 0, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype])
    with pytest.raises(TypeError, match="dtype"):
        edm.load(pickled("ncsnpp"), dtype=torch.float64)


def test_files_that_hold_no_teacher(tmp_path):
    with pytest.raises(FileNotFoundError):
        edm.load(tmp_path / "nothing.pkl")
    path = tmp_path / "file.pkl"
    path.write_bytes(edm_files.dumps(edm_files.Plain("Generator")))
    with pytest.raises(ValueError, match="Generator"):
        edm.load(path)
    torch.save({"x": 1}, path)
    with pytest.raises(ValueError, match="zip archive"):
        edm.load(path)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"wrapper": "StyleGAN"}, r"'StyleGAN' is not supported; supported: EDMPrecond, VPPrecond"),
        ({"model_type": "DiT"}, "'DiT' is not supported in EDMPrecond"),
        ({"model_type": "UNet"}, "'UNet' is not supported in EDMPrecond"),
        ({"model_type": ["SongUNet"]}, "not supported in EDMPrecond"),
        ({"model_type": "DhariwalUNet"}, "the weights do not fit DhariwalUNet: the file lacks"),
        ({"num_blocks": 2}, "the file lacks 'dec.4x4_block2.*and [0-9]+ more"),
        ({"label_dim": 0}, "has besides 'map_label"),
        ({"label_dim": 6}, r"map_label.weight is torch.float32 \(16, 5\), expected floating-point \(16, 6\)"),
        ({"model_channels": 32}, "expected floating-point"),
        ({"model_channels": 30}, "cannot be built"),
        ({"num_blocks": 10**9}, "num_blocks"),
        ({"img_channels": "3"}, "cannot be built"),
        ({"img_channels": 10**7}, "in_channels"),
        ({"sigma_data": -1}, "sigma_data"),
        ({"sigma_data": float("nan")}, "sigma_data"),
        ({"chanel_mult": [1, 2]}, "unknown key 'chanel_mult'; did you mean 'channel_mult'"),
        ({"resample_filter": [1, 3, 3, 1]}, "resample_filter"),
        ({"resample_filter": [2, 1]}, "is not the filter"),
    ],
)
def test_networks_that_do_not_fit(change, says, tmp_path):
    path = saved_with(tmp_path, "ddpmpp", **change)
    with pytest.raises(edm.EDMError, match=says) as caught:
        edm.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(edm.EDMError, match=says):
        edm.convert(path, tmp_path / "out.safetensors")
    assert os.listdir(tmp_path) == ["file.pkl"]


@pytest.mark.parametrize("change", [{"C_1": -1}, {"M": 0}, {"M": 10**6}, {"M": 1.5}, {"C_2": "x"}])
def test_an_iddpm_chain_that_cannot_be(tmp_path, change):
    with pytest.raises(edm.EDMError, match=next(iter(change))):
        edm.load(saved_with(tmp_path, "iddpm", **change))


@pytest.mark.parametrize(
    ("positional", "keywords", "says"),
    [
        ((8, 3, 5, True, 0.002), {}, "arguments without names"),
        ((8,), {"img_resolution": 8}, "arguments without names"),
        (None, None, "does not say what arguments"),
    ],
)
def test_arguments_without_names(tmp_path, positional, keywords, says):
    def change(saved):
        saved._init_args = positional
        saved._init_kwargs = keywords if keywords is None else {**saved._init_kwargs, **keywords}

    with pytest.raises(ValueError, match=says):
        edm.load(saved_with(tmp_path, "ddpmpp", change))


def test_numbers_of_numpy_among_the_arguments(tmp_path):
    path = saved_with(tmp_path, "ddpmpp", sigma_data=np.float64(0.25), num_blocks=np.int64(1), protocol=2)
    assert edm.load(path).sigma_data == 0.25


@pytest.mark.parametrize("name", ["ddpmpp", "iddpm", "edm2"])
def test_convert_keeps_everything(name, pickled, tmp_path, call):
    out = tmp_path / "teacher.safetensors"
    code, said, _ = call("convert", pickled(name), out)
    wrapper, kind, _ = edm_files.NETWORKS[name]
    assert code == 0 and said.startswith(f"{out}: {wrapper}, {kind.__name__}")
    before, after = edm.load(pickled(name)), edm.load(out)
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())
    x, sigma, labels = edm_files.image()
    labels = labels if before.null_cond else None
    assert torch.equal(before.denoise(x, sigma, labels), after.denoise(x, sigma, labels))
    # Bare names, as the network's own state dict has them, and what it is in plain JSON.
    assert load_file(out).keys() == before.network.state_dict().keys()
    with safe_open(out, framework="pt") as file:
        what = json.loads(file.metadata()["emd_fast.edm"])
    assert (what["format"], what["class"], what["arguments"]["img_channels"]) == (1, wrapper, 3)
    assert os.listdir(tmp_path) == [out.name]


def test_convert_keeps_the_dtype_of_the_file(tmp_path):
    wrapper, network, kwargs = edm_files.network_of("edm2")
    path, out = tmp_path / "file.pkl", tmp_path / "out.safetensors"
    path.write_bytes(edm_files.dumps_edm2(edm_files.wrapped(network, wrapper, **kwargs).half()))
    edm.convert(path, out)
    assert {value.dtype for value in load_file(out).values()} == {torch.float16}
    assert {value.dtype for value in edm.load(out).state_dict().values()} == {torch.float32}


def test_convert_says_what_is_wrong(pickled, tmp_path, call):
    bad = tmp_path / "bad.pkl"
    bad.write_bytes(b"\x80\x04}X\x03\x00\x00\x00emacos\nsystem\nX\x04\x00\x00\x00true\x85Rs.")
    for source, out, expected, said in (
        (bad, "out.safetensors", 2, "'os.system': refused"),
        (tmp_path / "none.pkl", "out.safetensors", 2, "none.pkl"),
        (pickled("vp"), "out.pt", 2, ".safetensors"),
        (pickled("vp"), "no/out.safetensors", 2, "No such file"),
    ):
        code, _, error = call("convert", source, tmp_path / out)
        assert code == expected and said in error and error.count("\n") == 1
    assert os.listdir(tmp_path) == ["bad.pkl"]


def test_safetensors_that_hold_no_teacher(pickled, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"weight": torch.ones(2)}

    def refused(says):
        with pytest.raises(edm.EDMError, match=says) as caught:
            edm.load(path)
        assert "\n" not in str(caught.value)

    head = '{"format": 1, "class": '
    for text, says in (
        *((text, "does not say what network it holds") for text in ("{", "[]", "null", '{"format": 1}', "[" * 100_000)),
        (None, "does not say what network it holds"),
        ('{"format": 2, "class": "EDMPrecond", "arguments": {}}', "format version 2"),
        (head + '"Other", "arguments": {}}', "'Other' is not supported"),
        (head + '"EDMPrecond", "arguments": {}}', "lack 'img_channels'"),
    ):
        save_file(tensors, path, text and {"emd_fast.edm": text})
        refused(says)
    edm.convert(pickled("vp"), path)
    path.write_bytes(path.read_bytes()[:-9])
    refused("not a whole file of safetensors")


@pytest.mark.parametrize("name", ["ddpmpp", "adm", "edm2"])
def test_from_a_pickle_to_samples(name, pickled, tmp_path, call):
    out = tmp_path / "teacher.safetensors"
    assert call("convert", pickled(name), out)[0] == 0
    teacher = edm.load(out)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    trainer = EMDTrainer(
        teacher, EMDConfig(steps=2, batch_size=4, langevin_steps=2, num_classes=5, precision="float32")
    )
    for _ in range(2):
        metrics = trainer.step()
        assert all(math.isfinite(value.item()) for value in metrics.values()) and metrics["skipped"] == 0
    assert metrics["drift_rms"] > 0
    samples = trainer.generate(5)
    assert samples.shape == (5, 3, 8, 8) and samples.isfinite().all() and samples.std() > 0
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    for moved in (trainer.generator, trainer.fake_score):
        assert any(not torch.equal(a, b) for a, b in zip(moved.parameters(), trainer.teacher.parameters(), strict=True))
    trainer.save(tmp_path / "checkpoint.pt")
    resumed = EMDTrainer.resume(tmp_path / "checkpoint.pt", edm.load(pickled(name)))
    assert torch.equal(resumed.generate(5), samples)


@pytest.mark.usefixtures("without_pictures")
def test_a_recipe_runs(pickled, tmp_path, call):
    folder = tmp_path / "run"
    teacher = ["--teacher", pickled("ddpmpp"), "--num-classes=5"]
    code, said, error = call("distill", "cifar10", "--out", folder, *teacher, *TINY)
    assert code == 0, error
    assert said.strip() == str(folder / "report.md")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["std"].keys() == {"teacher", "init", "generator"}
    assert {path.name for path in (folder / "samples").glob("*.png")} == {"teacher.png", "init.png", "generator.png"}
    report = (folder / "report.md").read_text()
    assert "a pretrained teacher" in report and "no data to compare with" in report
    code, _, error = call("sample", folder, "-n", 4, "--out", tmp_path / "x.png")
    assert code == 0 and (tmp_path / "x.png").exists(), error


def test_a_recipe_says_what_it_lacks(pickled, tmp_path, refused):
    for words, expected, said in (
        (("distill", "cifar10", *TINY), 2, "--teacher"),
        (("distill", "cifar10", "--teacher", pickled("vp"), *TINY), 2, "num_classes must be 0"),
        (("distill", "edm2", "--teacher", "none.pkl", *TINY), 2, "none.pkl"),
        (("study", "edm2"), 2, "no study"),
    ):
        refused(expected, said, *words, "--out", tmp_path / "run")
