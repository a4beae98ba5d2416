"""Settings of diffusers folders and files: sizes, schedules, files that are no teacher, values of another kind."""

from __future__ import annotations

import json
import math

import diffusers_folders as folders
import pytest
import torch

from emd_fast.config import ConfigError, EMDConfig
from emd_fast.teachers import diffusers as teachers
from emd_fast.teachers.diffusers import weights
from emd_fast.train.times import with_shift

diffusers = pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors.torch")


def test_a_sample_shape_for_a_folder_without_a_size(tmp_path, monkeypatch, capsys):
    from emd_fast.cli import commands

    monkeypatch.chdir(tmp_path)
    folder = folders.unet(tmp_path / "copy")
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": None}))
    words = ["distill", "--teacher", "copy", "--out", "run", "--steps=1", "--batch-size=2", "--langevin-steps=1"]
    words += [f"--t-star={300 / 999}", "--input-scale=1", "--lr-warmup=0"]
    for more, said in {
        (): "has no sample_size: give --sample-shape C,H,W",
        ("--sample-shape", "1,8,8"): "sample_shape must be (3, H, W)",
        ("--sample-shape", "3,8"): "sample_shape must be",
        ("--teacher", "x.pkl", "--sample-shape", "3,8,8"): "sample_shape is for diffusers folders",
    }.items():
        assert commands.main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.strip().splitlines()) == 1, error
    assert commands.main([*words, "--sample-shape", "3,8,16"]) == 0, capsys.readouterr().err
    assert commands.main(["export", "run", "one-step"]) == 0
    pipeline = diffusers.DiffusionPipeline.from_pretrained("one-step")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=1).images[0].size == (16, 8)


FLOW, DYNAMIC = "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}
SOLVER = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        ({"_class_name": FLOW}, 1.0),
        ({"_class_name": FLOW, "shift": 3}, 3.0),
        ({**SOLVER, "flow_shift": 5.0}, 5.0),
        ({"_class_name": FLOW, "shift": 3.0, **DYNAMIC}, math.exp(0.5 + 0.65 * (16 - 256) / (4096 - 256))),
        ({"_class_name": FLOW, "shift": "3"}, None),
        ({"_class_name": FLOW, "shift": 0}, None),
        ({"_class_name": FLOW, "shift": math.nan}, None),
        ({"_class_name": FLOW, **DYNAMIC, "max_shift": [1]}, None),
        ({"_class_name": FLOW, **DYNAMIC, "max_image_seq_len": 256}, None),
        ({"_class_name": FLOW, **DYNAMIC, "max_shift": 1e9, "base_image_seq_len": 0}, None),
    ],
)
def test_the_shift_of_times_is_that_of_the_scheduler(tmp_path, scheduler, shift):
    folders.bare_sd3(tmp_path)
    teacher = teachers.load(tmp_path, scheduler=scheduler)  # of 4 x 4 tokens
    times = {"time_distribution": {"kind": "shifted"}}
    if shift is None:
        with pytest.raises(ConfigError, match="scheduler has no shift that can be used: give shift, the s of"):
            with_shift(EMDConfig(**times), teacher)
    else:
        assert with_shift(EMDConfig(**times), teacher).time_distribution.shift == pytest.approx(shift, rel=1e-12)
    assert with_shift(EMDConfig(), teacher) == EMDConfig()
    given = EMDConfig(time_distribution={"kind": "shifted", "shift": 2.0})
    assert with_shift(given, teacher) == given


def test_times_that_do_not_fit_are_refused_before_prompts_are_encoded(tmp_path, monkeypatch, capsys):
    from emd_fast.cli import commands

    monkeypatch.chdir(tmp_path)
    folders.stable_diffusion(tmp_path / "copy")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    monkeypatch.setattr(teachers.DiffusersDenoiser, "text_encoder", lambda self: pytest.fail("prompts are encoded"))
    words = ["distill", "--teacher=copy", "--out=run", "--prompts=prompts.txt", "--t-star=0.6"]
    capsys.readouterr()
    assert commands.main([*words, "--time-distribution.kind=shifted"]) == 2
    error = capsys.readouterr().err
    assert 'time_distribution of kind "shifted" needs a rectified flow' in error and error.count("\n") == 1, error


@pytest.mark.parametrize("betas", ["sigmoid", "laplace"])
def test_betas_that_ddpm_alone_computes(tmp_path, betas):
    scheduler = diffusers.DDPMScheduler(beta_schedule=betas)
    teacher = teachers.load(folders.unet(tmp_path / "teacher"), scheduler=scheduler)
    index = torch.arange(0, 1000, 37)
    alpha = teacher.schedule.alpha(teacher.time(index.float())).double()
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod[index].double(), rtol=2e-4, atol=0)


def test_betas_that_nothing_computes(tmp_path):
    config = {"_class_name": "PNDMScheduler", "beta_schedule": "exp"}
    with pytest.raises(ConfigError, match="beta_schedule 'exp' of PNDMScheduler is not supported: linear, "):
        teachers.load(folders.unet(tmp_path / "teacher"), scheduler=config)


@pytest.mark.parametrize(
    ("names", "metadata", "said"),
    [
        (
            "model.diffusion_model.out.0.weight",
            {},
            "a single-file checkpoint of Stable Diffusion, which does not describe",
        ),
        ("conv_in.weight", {"format": "pt"}, "give --teacher-config FOLDER with its config.json"),
        ("x", {"emd_fast": "{}"}, "a generator that `emd-fast export` wrote"),
    ],
)
def test_single_files_that_are_no_teacher(tmp_path, monkeypatch, capsys, names, metadata, said):
    from emd_fast.cli import commands

    monkeypatch.chdir(tmp_path)
    table = {names: torch.ones(2)}
    safetensors.save_file(table, "x.safetensors", metadata)
    torch.save({"state_dict": table}, "x.ckpt")
    for name, words in {
        "x.safetensors": said,
        "x.ckpt": "convert a checkpoint of Stable Diffusion to .safetensors",
    }.items():
        assert commands.main(["distill", "--teacher", name, "--out", "run"]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1, error


@pytest.mark.parametrize(
    ("key", "value", "fits"),
    [
        ("norm_eps", None, False),
        ("norm_eps", "1e-5", False),
        ("num_layers", "2", False),
        ("num_layers", True, False),
        ("activation_fn", 3, False),
        ("attention_bias", "yes", False),
        ("norm_eps", 1, True),
        ("dropout", 0, True),
        ("upcast_attention", None, True),
        ("sample_size", None, True),
        ("num_embeds_ada_norm", None, True),
    ],
)
def test_values_of_another_kind_than_the_default(key, value, fits):
    config = {"norm_eps": 1e-5, key: value}
    if fits:
        weights.check_kinds(diffusers.DiTTransformer2DModel, config)
    else:
        with pytest.raises(ValueError, match=f"its configuration has {key} = .* where one like .* is expected"):
            weights.check_kinds(diffusers.DiTTransformer2DModel, config)
