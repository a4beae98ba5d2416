"""Teachers from folders of diffusers: schedules, outputs, conditions, and what is said when something is wrong."""

import copy
import dataclasses
import re
import subprocess
import sys

import diffusers_folders as folders
import pytest
import torch

from emd_fast import EMDConfig, EMDTrainer, schedules
from emd_fast.config import ConfigError
from emd_fast.teachers import diffusers as teachers
from emd_fast.train import conditions

diffusers = pytest.importorskip("diffusers")
needs_text = pytest.mark.skipif(folders.transformers_missing() is not None, reason=str(folders.transformers_missing()))


def made(make):
    """A fixture: the folder of a teacher."""
    return pytest.fixture(scope="module")(lambda tmp_path_factory: make(tmp_path_factory.mktemp("made") / "teacher"))


unet, dit = made(folders.unet), made(folders.dit)
text_unet, sd3 = made(folders.bare_text_unet), made(folders.bare_sd3)  # which take embeddings, and nothing else


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_alpha_and_sigma_are_those_of_the_scheduler(unet, name, betas):
    scheduler = getattr(diffusers, name)(beta_schedule=betas)
    teacher = teachers.load(unet, scheduler=scheduler)
    index = torch.arange(0, 1000, 37)
    alpha_squared = scheduler.alphas_cumprod[index].double()
    t = teacher.time(index.float())
    # float32 products of up to a thousand factors, on diffusers' side.
    torch.testing.assert_close(teacher.schedule.alpha(t).double() ** 2, alpha_squared, rtol=2e-4, atol=0)
    torch.testing.assert_close(teacher.schedule.sigma(t).double() ** 2, 1 - alpha_squared, rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(teacher.network_inputs(t)[1], index.float(), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_denoised_images_are_those_of_the_scheduler(unet, prediction):
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    teacher = teachers.load(unet, scheduler=scheduler)
    x_t = torch.randn(2, 3, 8, 8)
    for index in (1, 500, 900):
        output = teacher.network.model(x_t, index).sample
        theirs = scheduler.step(output, index, x_t).pred_original_sample
        ours = teacher.denoise(x_t, torch.full((2,), teacher.time(index)))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_rectified_flow(sd3):
    teacher = teachers.load(sd3)
    assert teacher.schedule == schedules.RectifiedFlow() and teacher.parametrization == "flow"
    t = torch.tensor([0.25])
    assert teacher.network_inputs(t)[1].item() == 250.0 and teacher.time(250) == 0.25
    cond = {"prompt_embeds": torch.randn(1, 5, 16), "pooled_projections": torch.randn(1, 16)}
    x_t = torch.randn(1, 4, 8, 8)
    velocity = teacher.network.model(x_t, *cond.values(), torch.tensor([250.0])).sample
    torch.testing.assert_close(teacher.denoise(x_t, t, cond), x_t - 0.25 * velocity, rtol=0, atol=1e-6)


def test_zero_terminal_snr_keeps_a_trace_of_signal(unet):
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    teacher = teachers.load(unet, scheduler=scheduler)
    last, before = teacher.schedule.alpha(torch.tensor([1.0, teacher.time(998)]))
    assert 0 < last <= 2.0**-12 and last < before
    inner = torch.arange(0, 999, 37)
    alpha = teacher.schedule.alpha(teacher.time(inner.float()))
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod[inner], rtol=2e-4, atol=1e-8)


@pytest.mark.parametrize(
    ("scheduler", "index", "allowed"),
    [
        ({"rescale_betas_zero_snr": True}, 999, False),
        ({"rescale_betas_zero_snr": True}, 998, False),  # alpha is 6e-5
        ({"rescale_betas_zero_snr": True}, 900, True),
        ({"beta_schedule": "squaredcos_cap_v2"}, 999, False),
        ({"beta_schedule": "squaredcos_cap_v2"}, 998, True),
        ({}, 999, True),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 999, True),
        ({"rescale_betas_zero_snr": True, "prediction_type": "sample"}, 999, True),
    ],
)
def test_a_generator_does_not_start_where_noise_is_divided_by_no_signal(unet, scheduler, index, allowed):
    teacher = teachers.load(unet, scheduler=diffusers.DDIMScheduler(**scheduler))
    config = EMDConfig(steps=1, batch_size=2, langevin_steps=1, t_star=teacher.time(index), input_scale=1.0)
    if allowed:
        assert EMDTrainer(teacher, config).generate(4).std() < 1000
        return
    with pytest.raises(ConfigError, match="a network that predicts noise is divided by it: take t_star up to") as error:
        EMDTrainer(teacher, config)
    largest = float(re.search(r"up to ([\d.]+),", str(error.value)).group(1))
    EMDTrainer(teacher, dataclasses.replace(config, t_star=largest))


def test_between_indices_the_network_is_told_the_fraction(unet):
    teacher = teachers.load(unet)
    around = teacher.schedule.log_alpha(torch.tensor([teacher.time(10), teacher.time(10.5), teacher.time(11)]))
    torch.testing.assert_close(around[1], around[[0, 2]].mean())
    assert teacher.network_inputs(torch.tensor([teacher.time(10.5)]))[1].item() == pytest.approx(10.5, abs=1e-4)


def test_a_learned_variance_is_cut_off(dit):
    teacher = teachers.load(dit)
    x, t, labels = torch.randn(2, 4, 8, 8), torch.full((2,), teacher.time(100)), torch.tensor([3, 10])
    whole = teacher.network.model(x, timestep=torch.full((2,), 100), class_labels=labels).sample
    assert whole.shape == (2, 8, 8, 8)
    torch.testing.assert_close(teacher(x, t, labels), whole[:, :4], rtol=0, atol=1e-4)
    assert teacher.null_cond == 10 and teacher.num_classes == 10


def test_a_dtype_and_a_model_inside_a_pipeline(unet):
    inside, around = teachers.load(unet / "unet"), teachers.load(unet, dtype=torch.bfloat16)
    assert inside.schedule == around.schedule
    for mine, half in zip(inside.parameters(), around.parameters(), strict=True):
        assert half.dtype == torch.bfloat16 and torch.equal(mine.bfloat16(), half)
    assert around(torch.randn(1, 3, 8, 8), torch.tensor([0.5])).dtype == torch.bfloat16


def test_a_copy_shares_the_folder_and_no_weight(dit):
    teacher = teachers.load(dit)
    copied = copy.deepcopy(teacher)
    assert copied.folder is teacher.folder and copied.same_form(teacher)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in teacher.parameters()}
    assert not [name for name in teacher.state_dict() if "vae" in name]


def test_latents_are_decoded_with_scale_and_shift(tmp_path):
    folder = folders.dit(tmp_path / "dit")
    folders.vae(shift_factor=0.25).save_pretrained(folder / "vae")
    teacher = teachers.load(folder)
    latents = torch.randn(2, 4, 8, 8)
    theirs = diffusers.AutoencoderKL.from_pretrained(folder / "vae").decode(latents / 0.5 + 0.25).sample
    assert torch.equal(teacher.decode(latents), theirs)


@needs_text
def test_prompts_are_encoded_as_the_pipeline_does(tmp_path):
    folder = folders.stable_diffusion(tmp_path / "sd")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    theirs, _ = pipeline.encode_prompt(["a b", "c"], "cpu", 1, False)
    ours = teachers.load(folder).encode(["a b", "c"])
    assert torch.equal(ours, theirs) and ours.shape == (2, 12, 8) and not torch.equal(ours[0], ours[1])


@needs_text
def test_guidance_with_the_empty_prompt(tmp_path):
    teacher = teachers.load(folders.sd3(tmp_path / "sd3"))
    prompts = teacher.encode(["a b", "c"])
    config = EMDConfig(steps=1, batch_size=2, langevin_steps=1, t_star=1.0, guidance=3.0)
    with pytest.raises(ValueError, match="guidance needs a null condition"):
        EMDTrainer(teacher, config, prompts=prompts).step()
    teacher.null_cond = teacher.encode([""])
    metrics = EMDTrainer(teacher, config, prompts=prompts).step()
    assert metrics["drift_rms"] > 0


@pytest.mark.parametrize("mapped", [False, True])
def test_prompts_are_drawn_by_the_noise_contract(text_unet, tmp_path, mapped):
    teacher, prompts = teachers.load(text_unet), torch.randn(5, 3, 8)
    assert teacher.sample_shape == (4, 8, 8)
    config = EMDConfig(steps=1, batch_size=4, langevin_steps=1, t_star=0.5)
    conditions.save(tmp_path / "prompts.safetensors", prompts, torch.zeros(1, 3, 8))
    table = conditions.Mapped(tmp_path / "prompts.safetensors") if mapped else prompts
    trainer = EMDTrainer(teacher, config, prompts=table)
    drawn = trainer.batches.conditions(None, 0, 4, 0)
    found = [int((prompts == row).all((1, 2)).nonzero()) for row in drawn]
    # By the global index of a sample, whoever takes it.
    alone = [trainer.batches.conditions(None, i, i + 1, 0) for i in range(4)]
    assert torch.equal(torch.cat(alone), drawn)
    other = trainer.batches.conditions(None, 0, 4, 1)
    assert found != [int((prompts == row).all((1, 2)).nonzero()) for row in other]
    assert trainer.step()["skipped"] == 0
    # Shown in turn.
    assert torch.equal(trainer.generate(7), trainer.generate(7, prompts[torch.arange(7) % 5]))


def test_a_table_of_prompts_on_disk(tmp_path):
    cond = {"prompt_embeds": torch.randn(4, 2, 3), "pooled_projections": torch.randn(4, 5).bfloat16()}
    null = {name: torch.zeros_like(value[:1]) for name, value in cond.items()}
    conditions.save(tmp_path / "both", cond, null)
    conditions.save(tmp_path / "alone", cond["prompt_embeds"])
    both, alone = conditions.Mapped(tmp_path / "both"), conditions.Mapped(tmp_path / "alone")
    index = torch.tensor([2, 0, 2])
    assert len(both) == 4 and all(torch.equal(both[index][name], cond[name][index]) for name in cond)
    assert both.null_cond.keys() == null.keys() and alone.null_cond is None
    assert torch.equal(alone[index], cond["prompt_embeds"][index])
    (tmp_path / "bad").write_text("no")
    with pytest.raises(ValueError, match="cannot read the conditions in"):
        conditions.Mapped(tmp_path / "bad")


DDPM, EULER = {"_class_name": "DDPMScheduler"}, {"_class_name": "EulerDiscreteScheduler"}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


@pytest.mark.parametrize(
    ("folder", "scheduler", "error", "said"),
    [
        ("nowhere", None, FileNotFoundError, "is no folder"),
        (".", None, ValueError, "is no model of diffusers"),
        ("other", None, ValueError, "holds a UNet3DConditionModel, which is not supported: UNet2DConditionModel, "),
        ("other", None, ValueError, "emd_fast/teachers/diffusers/architectures/unet3dcondition.py would add it"),
        ("bare", None, ValueError, "give load() a scheduler"),
        ("bare", {"_class_name": "KarrasVeScheduler"}, ValueError, "KarrasVeScheduler is not supported: DDPMScheduler"),
        ("bare", {**DDPM, "prediction_type": "flow_prediction"}, ValueError, "'flow_prediction' of DDPMScheduler"),
        ("bare", {**EULER, "timestep_type": "continuous"}, ValueError, "timestep_type = 'continuous'"),
        ("bare", {**FLOW, "invert_sigmas": True}, ValueError, "invert_sigmas = True"),
        ("bare", {**DDPM, "beta_end": "0.02"}, ValueError, "beta_end = '0.02' where one like 0.02 is expected"),
        ("bare", {**DDPM, "rescale_betas_zero_snr": "false"}, ValueError, "rescale_betas_zero_snr = 'false' where"),
        ("bare", {**DDPM, "trained_betas": ["0.1", "0.2"]}, ValueError, "trained_betas must be a list of 2 to"),
    ],
)
def test_folders_and_schedulers_that_are_no_teacher(tmp_path, folder, scheduler, error, said):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet3DConditionModel"}')
    if folder == "bare":
        folders.text_unet().save_pretrained(tmp_path / "bare")
        assert teachers.load(tmp_path / "bare", scheduler=diffusers.DDPMScheduler()).parametrization == "eps"
    with pytest.raises(error, match=re.escape(said)) as caught:
        teachers.load(tmp_path / folder, scheduler=scheduler)
    assert "\n" not in str(caught.value)


def test_labels_and_prompts_that_do_not_match(unet, dit, text_unet, sd3):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.5, 0.5])
    tokens = torch.randn(2, 3, 8)
    wrong = [
        (unet, torch.tensor([0, 1]), ValueError, "takes no condition"),
        (dit, tokens, TypeError, "labels must be int64"),
        (dit, None, ValueError, "takes labels: an int64 tensor (B,) below 11"),
        (dit, torch.tensor([1, 11]), ValueError, "labels must be in [0, 11)"),
        (text_unet, torch.tensor([1, 2]), ValueError, "takes text embeddings (B, tokens, 8)"),
        (text_unet, torch.randn(2, 3, 7), ValueError, "got a float32 tensor (2, 3, 7)"),
        (sd3, tokens, ValueError, "a dict of prompt_embeds"),
        (sd3, {"prompt_embeds": tokens, "pooled_projections": tokens}, ValueError, "pooled_projections (B, 16)"),
    ]
    for folder, cond, kind, said in wrong:
        with pytest.raises(kind, match=re.escape(said)) as error:
            teachers.load(folder)(x if folder != unet else x[:, :3], t, cond)
        assert "\n" not in str(error.value)
    for folder, said in ((dit, "not prompts"), (text_unet, "no text encoder")):
        with pytest.raises(ValueError, match=said):
            teachers.load(folder).encode(["a cat"])


def test_without_diffusers_one_line_says_so():
    script = "import sys; sys.modules['diffusers'] = None\nimport emd_fast.export.pipeline\n"
    script += "from emd_fast.teachers import diffusers\ndiffusers.load('x')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    said = 'teachers from diffusers folders need diffusers: `pip install "emd_fast[diffusers]"`'
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == f"ModuleNotFoundError: {said}"
