"""The command line with a teacher from a folder, or from a function: distill, sample, export, sample again."""

import io
import json
import shutil

import detector_files
import diffusers_folders as folders
import pytest
import torch
from PIL import Image

from emd_fast import Denoiser, EMDTrainer, schedules
from emd_fast.export import pipeline
from emd_fast.tasks import encoded
from emd_fast.teachers.small_unet import SmallUNet
from emd_fast.train import conditions, run_checkpoints

pytestmark = pytest.mark.usefixtures("without_pictures")  # grids of samples are drawn all the same

TINY = ["--steps=2", "--batch-size=2", "--langevin-steps=1", "--fake-score-updates=1", "--lr-warmup=0"]
REPLAY = ("replay", "run", "--step", "2", "--sample", "0")


def done(result):
    assert result[0] == 0, result[2]
    return result[1]


def samples(call, source, *words):
    done(call("sample", source, "-n", "3", "--out", "x.pt", *words))
    return torch.load("x.pt")


def test_a_diffusers_folder_from_distill_to_a_pipeline(call, refused, tmp_path):
    pytest.importorskip("diffusers")
    folders.dit(tmp_path / "teacher")
    refused(2, "give --num-classes 10", "distill", "--teacher", "teacher", "--out", "run", *TINY)
    words = ["distill", "--teacher", "teacher", "--out", "run", "--num-classes=10", *TINY]
    assert done(call(*words)).strip() == "run/report.md"
    assert {path.name for path in (tmp_path / "run" / "samples").iterdir()} == {
        f"{name}.png" for name in ("teacher", "init", "generator")
    }
    assert "is finished" in call(*words)[2]
    done(call("export", "run", "one-step"))
    assert torch.equal(samples(call, "one-step"), samples(call, "run"))
    assert torch.equal(samples(call, "one-step", "--label", "7"), samples(call, "run", "--label", "7"))
    done(call("export", "run", "raw.safetensors", "--raw"))
    assert torch.equal(samples(call, "raw.safetensors"), samples(call, "run", "--raw"))
    done(call("sample", "one-step", "-n", "4", "--out", "grid.png"))
    refused(2, "--label must be in [0, 10)", "sample", "one-step", "--label", "10", "--out", "grid.png")
    assert (tmp_path / "one-step" / "model_index.json").exists()
    # sigma(t_star) as input scale is nothing that DiTPipeline can do.
    done(call("distill", "--teacher", "teacher", "--out", "scaled", "--num-classes", "10", "--input-scale=none", *TINY))
    _, _, err = call("export", "scaled", "scaled-out")
    assert "train with input_scale = 1" in err and len(err.strip().splitlines()) == 1
    assert torch.equal(samples(call, "scaled-out"), samples(call, "scaled"))


def test_prompts_that_were_encoded_before(call, refused, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    folders.bare(folders.text_unet(), diffusers.DDPMScheduler(), tmp_path / "teacher")
    words = ["distill", "--teacher", "teacher", "--out", "run", "--guidance=2", *TINY]
    refused(2, "give --prompts FILE", *words)
    conditions.save(tmp_path / "p.safetensors", torch.randn(5, 3, 8), torch.zeros(1, 3, 8))
    done(call(*words, "--prompts", "p.safetensors"))
    assert samples(call, "run").shape == (3, 4, 8, 8)
    refused(2, "has no text encoder", "sample", "run", "--prompt", "a", "--out", "x.pt")
    conditions.save(tmp_path / "p.safetensors", torch.randn(5, 3, 8), torch.zeros(1, 3, 8))
    said = "p.safetensors is not the table of conditions that run began with"
    refused(2, said, *words, "--prompts", "p.safetensors", "--steps=3")
    refused(2, said, "sample", "run", "--out", "x.pt")
    (tmp_path / "run" / "conditions.json").write_text("{}")
    refused(2, "conditions.json is damaged", "sample", "run", "--out", "x.pt")
    conditions.save(tmp_path / "large.safetensors", torch.full((5, 3, 8), 1e38), torch.zeros(1, 3, 8))
    said = "does not take the conditions in large.safetensors: it returns NaN or infinite values for them"
    refused(2, said, *words, "--prompts", "large.safetensors", "--out", "large")
    conditions.save(tmp_path / "without.safetensors", torch.randn(5, 3, 8))
    words += ["--prompts", "without.safetensors", "--out", "none"]
    refused(2, "needs a null condition, and without.safetensors has none", *words)


@pytest.mark.skipif(folders.transformers_missing() is not None, reason=str(folders.transformers_missing()))
def test_a_run_that_was_killed_while_it_encoded_can_be_corrected(call, monkeypatch, tmp_path):
    folders.stable_diffusion(tmp_path / "teacher")
    (tmp_path / "p.txt").write_text("a\n" * 40)
    (tmp_path / "q.txt").write_text("b\n")
    words = ["distill", "--teacher", "teacher", "--out", "run", *TINY]
    write, calls = conditions.Writer.write, []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(conditions.Writer, "write", killed)
    assert call(*words, "--prompts", "p.txt")[0] == 130
    assert {"prompts.part", "prompts.part.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}
    done(call(*words, "--prompts", "q.txt", "--seed=1", "--guidance=2"))
    assert len(calls) == 3 and not list((tmp_path / "run").glob("prompts.part*"))
    code, _, err = call(*words, "--prompts", "p.txt", "--seed=1", "--guidance=2", "--steps=3")
    assert code == 2 and "holds a run with" in err


@pytest.mark.skipif(folders.transformers_missing() is not None, reason=str(folders.transformers_missing()))
def test_a_text_encoder_of_another_class_is_refused_before_anything_is_encoded(call, monkeypatch, tmp_path):
    folders.stable_diffusion(tmp_path / "teacher")
    path = tmp_path / "teacher" / "model_index.json"
    path.write_text(path.read_text().replace("CLIPTextModel", "BertModel"))
    (tmp_path / "p.txt").write_text("a\n")
    monkeypatch.setattr(encoded, "encoded", None)
    words = ["--teacher", "teacher", *TINY, "--prompts"]
    for command in ("distill", "plan"):
        code, _, err = call(command, *words, "p.txt")
        assert code == 2 and "cannot use the pipeline in teacher: its text_encoder is" in err.splitlines()[-1]
    conditions.save(tmp_path / "p.safetensors", torch.zeros(5, 3, 8))
    done(call("distill", *words, "p.safetensors", "--out", "run"))  # embeddings need no encoder


@pytest.mark.skipif(folders.transformers_missing() is not None, reason=str(folders.transformers_missing()))
def test_prompts_from_a_text_file(call, refused, tmp_path):
    folders.stable_diffusion(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a b\n\nc\n")
    words = ["distill", "--teacher", "teacher", "--prompts", "prompts.txt", "--out", "run", "--guidance=2", *TINY]
    done(call(*words))
    assert len(conditions.Mapped(tmp_path / "run" / "prompts.safetensors")) == 2
    done(call("export", "run", "one-step"))
    assert torch.equal(samples(call, "run", "--prompt", "d"), samples(call, "one-step", "--prompt", "d"))
    (tmp_path / "prompts.txt").write_text("a b\nd\n")
    refused(2, "prompts.txt is not the text that run/prompts.safetensors was made with", *words, "--steps=3")


@pytest.mark.skipif(folders.transformers_missing() is not None, reason=str(folders.transformers_missing()))
@pytest.mark.parametrize("kind", ["stable_diffusion", "sd3"])
def test_an_export_without_a_stock_pipeline_encodes_prompts(call, tmp_path, kind):
    getattr(folders, kind)(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    words = ["distill", "--teacher", "teacher", "--prompts", "prompts.txt", "--out", "run", *TINY]
    done(call(*words, "--t-star=0.30035", "--input-scale=1"))
    done(call("export", "run", "one-step"))
    assert not (tmp_path / "one-step" / "model_index.json").exists()
    expected = samples(call, "run", "--prompt", "d")
    (tmp_path / "teacher").rename(tmp_path / "away")
    assert torch.equal(samples(call, "one-step", "--prompt", "d"), expected)


def small():
    """A teacher of one's own."""
    network = SmallUNet(3, channels=4, num_classes=0)
    return Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(3, 8, 8))


def test_a_function_is_a_teacher(call, refused, tmp_path):
    done(call("distill", "--teacher", "test_diffusers_cli:small", "--out", "run", *TINY))
    named = ("--teacher", "test_diffusers_cli:small")
    done(call("export", "run", "one.safetensors", *named))
    assert torch.equal(samples(call, "one.safetensors"), samples(call, "run", *named))
    assert run_checkpoints.found(tmp_path / "run" / "checkpoints")
    code, _, err = call("export", "run", "folder", *named)
    assert code == 2 and "use format='safetensors'" in err and not (tmp_path / "folder").exists()
    # Its weights are others in every call: samples need none of them, and no training goes on with them.
    said = "made with a teacher of other weights (test_diffusers_cli:small, SHA-256 "
    refused(2, said, "distill", *named, "--out", "run", *TINY, "--steps=3")
    refused(2, said, *REPLAY, *named)
    refused(2, said, "evaluate", "run", *named)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("nothing:here", "cannot import the teacher's module 'nothing'"),
        ("broken:here", "cannot import the teacher's module 'broken': expected ':' (broken.py, line 1)"),
        ("test_diffusers_cli:nothing", "has no function 'nothing'"),
        ("test_diffusers_cli:one_of_none", "must return an emd_fast.Denoiser, got NoneType"),
        ("./nowhere", "./nowhere is no folder"),
    ],
)
def test_teachers_that_are_none(refused, monkeypatch, tmp_path, teacher, said):
    (tmp_path / "broken.py").write_text("def here()")
    monkeypatch.syspath_prepend(tmp_path)
    refused(2, said, "distill", "--teacher", teacher, "--out", "run", *TINY)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ("./file.py:make", "a path where a module is expected: give --teacher file:make"),
        ("sub/file.py:make", "give --teacher file:make, and run in sub or add it to PYTHONPATH"),
        ("sub/file:make", "give --teacher file:make, and run in sub"),
        ("file.py", "file.py is Python code: give --teacher file:FUNCTION"),
        ("file:", "is not package.module:function"),
        (":make", "is not package.module:function"),
    ],
)
def test_words_that_are_no_module_and_function(refused, tmp_path, teacher, said):
    (tmp_path / "file.py").write_text("def make(): ...")
    refused(2, said, "distill", "--teacher", teacher, "--out", "run", *TINY)


@pytest.mark.parametrize(
    ("t_star", "said"),
    [
        ("600", f"index 600 is teacher.time(600), give --t-star {600 / 999!r} for it"),
        ("2", f"got 2: index 599 is teacher.time(599), give --t-star {599 / 999!r} for it"),
        ("-1", "must be a time in [0, 1]"),
    ],
)
def test_an_index_is_no_time(refused, tmp_path, t_star, said):
    pytest.importorskip("diffusers")
    folders.unet(tmp_path / "teacher")
    refused(2, said, "distill", "--teacher", "teacher", "--out", "run", *TINY, f"--t-star={t_star}")


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


BROKEN = {
    "a VAE of another class": (
        lambda folder: changed(folder / "model_index.json", vae=["diffusers", "AutoencoderDC"]),
        "its vae is ['diffusers', 'AutoencoderDC'], which is not supported",
    ),
    "a VAE without weights": (
        lambda folder: next((folder / "vae").glob("*.safetensors")).unlink(),
        "vae has no weights of a known name",
    ),
    "a VAE of other channels": (
        lambda folder: (shutil.rmtree(folder / "vae"), folders.vae(channels=3).save_pretrained(folder / "vae")),
        "has 3 latent channels, the network has 4",
    ),
    "a class that is a list": (
        lambda folder: changed(folder / "transformer" / "config.json", _class_name=["a", "b"]),
        "_class_name in its config.json is ['a', 'b'], not the name of a class",
    ),
    "an unknown class": (
        lambda folder: changed(folder / "transformer" / "config.json", _class_name="Mine"),
        "holds a Mine, which is not supported",
    ),
    "a scheduler of a list": (
        lambda folder: changed(folder / "scheduler" / "scheduler_config.json", _class_name=["a"]),
        "the scheduler ['a'] is not supported",
    ),
    "a text encoder that is not there": (
        lambda folder: changed(folder / "model_index.json", text_encoder=["transformers", "CLIPTextModel"]),
        "has no folder text_encoder, which its model_index.json names",
    ),
}


@pytest.mark.parametrize("change", [{"beta_end": 0.021}, {"prediction_type": "v_prediction"}])
def test_a_run_does_not_go_on_with_another_scheduler(call, tmp_path, change):
    pytest.importorskip("diffusers")
    folders.unet(tmp_path / "teacher")
    words = ["distill", "--teacher", "teacher", "--out", "run", *TINY]
    done(call(*words))
    changed(tmp_path / "teacher" / "scheduler" / "scheduler_config.json", **change)
    for command in ([*words, "--steps=3"], ["sample", "run", "--out", "x.pt"], ["export", "run", "x"], REPLAY):
        code, _, err = call(*command)
        assert code and "another noise schedule or parametrization of the teacher" in err and err.count("\n") == 1, err
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_run_reads_last_is_checked_before_its_first_step(refused, tmp_path, monkeypatch, name):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(EMDTrainer, "step", lambda *_: pytest.fail("it trains"))
    change, said = BROKEN[name]
    change(folders.dit(tmp_path / "teacher"))
    refused(2, said, "distill", "--teacher", "teacher", "--out", "run", "--num-classes=10", *TINY)


def test_images_of_another_size_or_number_are_refused_before_the_first_step(call, refused, tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(EMDTrainer, "step", lambda *_: pytest.fail("it trains"))
    folders.dit(tmp_path / "teacher")  # its images are 16x16
    detector_files.detector(tmp_path / "detector.pt")
    words = ["distill", "--teacher", "teacher", "--out", "run", "--num-classes=10", "--samples=4", *TINY]
    words += ["--detector", "detector.pt", "--compare-with"]
    for folder, n, side, said in (("few", 3, 16, "has 3 images, 4 are generated"), ("small", 4, 8, "these are of")):
        detector_files.folder(tmp_path / folder, detector_files.pictures(n, size=side))
        refused(2, said, *words, folder)
    last = sorted(detector_files.folder(tmp_path / "damaged", detector_files.pictures(4, size=16)).rglob("*.png"))[-1]
    for content, said in ((b"no image", "cannot read the image"), (one_picture(8), "images must have one size")):
        last.write_bytes(content)
        code, _, err = call(*words, "damaged")
        assert code and said in err.splitlines()[-1] and last.name in err, err


def one_picture(side):
    content = io.BytesIO()
    Image.fromarray(detector_files.pictures(1, size=side)[0].permute(1, 2, 0).numpy()).save(content, "png")
    return content.getvalue()


def test_guidance_that_a_teacher_cannot_give(refused, tmp_path):
    pytest.importorskip("diffusers")
    folders.unet(tmp_path / "plain")
    folders.unet(tmp_path / "classes", num_class_embeds=4)
    for words, said in {
        ("plain",): "guidance needs conditions, and this teacher has none",
        ("classes", "--num-classes=4"): "guidance needs a null condition, and this teacher has none",
    }.items():
        refused(2, said, "distill", "--teacher", *words, "--guidance=2", "--out", "run", *TINY)


def test_folders_that_are_no_model(call, refused, tmp_path):
    pytest.importorskip("diffusers")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    folders.unet(tmp_path / "other")
    path = tmp_path / "other" / "unet" / "config.json"
    path.write_text(path.read_text().replace("16\n", "24\n"))
    for folder, said in {"config": "its config.json has no _class_name", "other": "do not fit its config.json"}.items():
        refused(2, said, "distill", "--teacher", folder, "--out", "run", *TINY)
        assert "If you want" not in call("distill", "--teacher", folder, "--out", "run", *TINY)[2]


def one_of_none():
    return None


def test_without_a_recipe_or_a_teacher_or_what_was_exported(call, refused, tmp_path):
    assert "required: recipe" in call("distill")[2]
    refused(2, "there is no teacher: give --teacher", "distill", "pretrained")
    with pytest.raises(ValueError, match="was not written by"):
        pipeline.load(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(folders.transformers_missing() is not None, reason=str(folders.transformers_missing()))
@pytest.mark.parametrize(
    ("recipe", "asked"), [("sd15", "num_inference_steps=1"), ("sd15-4", "timesteps=[625, 413, 208, 76")]
)
def test_the_recipes_of_stable_diffusion_run(call, tmp_path, recipe, asked):
    folders.stable_diffusion(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a b\nc\nd e\n")
    words = ["distill", recipe, "--prompts", "prompts.txt", "--out", "run", *TINY, "--micro-batch-size=1"]
    assert "there is no teacher: give --teacher" in call(*words)[2]
    done(call(*words, "--teacher", "teacher"))
    assert run_checkpoints.found(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002"
    done(exported := call("export", "run", "exported"))
    lines = exported[2].partition("diffusers samples it with these lines:\n")[2]
    assert f'pipeline("a cat", {asked}' in lines
    found = {}
    exec(lines, found)
    assert found["made"].size == (16, 16)


HOSTILE = {
    "unet": ("unet", {"attention_head_dim": -1, "downsample_padding": 7, "freq_shift": [1], "norm_eps": -1}),
    "dit": ("transformer", {"norm_eps": -1.5, "num_embeds_ada_norm": 10**9, "dropout": None, "patch_size": 0}),
    "bare_text_unet": (".", {"attention_head_dim": -1, "norm_eps": None, "cross_attention_dim": 1.5}),
    "bare text": (".", {"mid_block_scale_factor": 0, "downsample_padding": [], "norm_eps": -1}),
    "bare_sd3": (".", {"num_layers": 10**18, "pos_embed_max_size": float("nan"), "qk_norm": 3}),
}  # fmt: skip


@pytest.mark.parametrize("make", HOSTILE)
def test_hostile_values_of_a_configuration_end_in_one_line_before_the_training(call, tmp_path, make):
    pytest.importorskip("diffusers")
    getattr(folders, "bare_text_unet" if make == "bare text" else make)(tmp_path / "teacher")
    part, changes = HOSTILE[make]
    path = tmp_path / "teacher" / part / "config.json"
    config = json.loads(path.read_text())
    cond = torch.zeros(3, 2, 8)
    if make == "bare_sd3":
        cond = {"prompt_embeds": torch.zeros(3, 2, 16), "pooled_projections": torch.zeros(3, 16)}
    conditions.save(tmp_path / "p.safetensors", cond)
    words = {"unet": [], "dit": ["--num-classes=10"]}.get(make, ["--prompts", "p.safetensors"])
    done(call("distill", "--teacher", "teacher", *words, "--out", "run", *TINY))
    for key, value in (changes | {"sample_size": -1, "in_channels": 0, "_class_name": None}).items():
        path.write_text(json.dumps({**config, key: value}))
        code, _, err = call("distill", "--teacher", "teacher", *words, "--out", "other", *TINY)
        assert code == 2 and len(err.strip().splitlines()) == 1, (key, value, err)
        assert not list((tmp_path / "other").glob("checkpoints/*"))
