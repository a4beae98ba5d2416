"""A distilled diffusers teacher on disk: our loader gives the trainer's bits, stock pipelines the same to rounding."""

import json
import warnings

import diffusers_folders as folders
import pytest
import torch
from helpers import seeded

from emd_fast import EMDConfig, EMDTrainer, Generator
from emd_fast.export.pipeline import NotForStock, export, load
from emd_fast.teachers import diffusers as teachers

diffusers = pytest.importorskip("diffusers")
needs_text = pytest.mark.skipif(folders.transformers_missing() is not None, reason=str(folders.transformers_missing()))
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

MAKERS = {
    "unet": folders.unet,
    "dit": folders.dit,
    "text_unet": folders.stable_diffusion,
    "sd3": folders.sd3,
    "bare_text_unet": folders.bare_text_unet,
    "bare_sd3": folders.bare_sd3,
}
TOKENS, POOLED = torch.linspace(-1, 1, 96).reshape(2, 3, 16), torch.linspace(-1, 1, 32).reshape(2, 16)
EMBEDDED = {"bare_text_unet": TOKENS[..., ::2], "bare_sd3": {"prompt_embeds": TOKENS, "pooled_projections": POOLED}}
KINDS = [pytest.param(name, marks=needs_text if name in ("text_unet", "sd3") else ()) for name in MAKERS]


@pytest.fixture(scope="module")
def distilled(tmp_path_factory):
    """name -> (trainer after two steps, its conditions for three samples), each made once."""
    made = {}

    def make(name):
        if name not in made:
            teacher = teachers.load(MAKERS[name](tmp_path_factory.mktemp(name) / "teacher"))
            prompts = teacher.encode(["a b", "c"]) if name in ("text_unet", "sd3") else EMBEDDED.get(name)
            trainer = trained(teacher, prompts=prompts)
            cond = torch.tensor([3, 0, 9]) if teacher.num_classes else None
            cond = cond if prompts is None else trainer.prompts[torch.tensor([0, 1, 1])]
            made[name] = trainer, cond
        return made[name]

    return make


def trained(teacher, prompts=None, steps=2, **changes):
    t_star = 1.0 if teacher.parametrization == "flow" else teacher.time(300)
    options = {"t_star": t_star, "input_scale": 1.0, "num_classes": teacher.num_classes, **changes}
    # A rate at which two steps move the weights and their average away from the teacher's, and apart.
    config = EMDConfig(steps=2, batch_size=3, langevin_steps=2, fake_score_updates=1, generator_lr=1e-2, **options)
    trainer = EMDTrainer(teacher, config, prompts=prompts)
    for _ in range(steps):
        metrics = trainer.step()
        assert all(value.isfinite() for value in metrics.values())
    return trainer


def silent(path, trainer, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return export(trainer, path, **options)


@pytest.mark.filterwarnings("ignore::emd_fast.export.pipeline.NotForStock")
@pytest.mark.parametrize("format", ["diffusers", "safetensors"])
@pytest.mark.parametrize("name", KINDS)
def test_our_loader_gives_the_bits_of_the_trainer(distilled, tmp_path, name, format):
    trainer, cond = distilled(name)
    for ema in (True, False):
        loaded = load(export(trainer, tmp_path / f"{ema}", format, ema=ema))
        assert torch.equal(loaded.sample(3, cond), trainer.generate(3, cond, ema=ema))
    assert not torch.equal(trainer.generate(3, cond, ema=False), trainer.generate(3, cond))
    untrained = Generator(trainer.teacher, trainer.config.t_star, input_scale=1.0)
    z = torch.randn(3, *trainer.sample_shape)
    assert not torch.equal(loaded(z, cond), untrained(z, cond))


def same(stock, ours):
    """Images in [0, 1] of a stock pipeline are those of our samples in [-1, 1]."""
    ours = (ours / 2 + 0.5).clamp(0, 1)
    inside = ((ours > 0) & (ours < 1)).double().mean()
    assert inside > 0.2, f"only {inside:.0%} of the pixels are not clipped: this would compare nothing"
    torch.testing.assert_close(stock, ours, rtol=0, atol=2e-5)


def pipeline_of(path, **components):
    made = diffusers.DiffusionPipeline.from_pretrained(path, **components)
    made.set_progress_bar_config(disable=True)
    return made


def noise(shape):
    return torch.randn(shape, generator=seeded(5))  # what a pipeline draws


def test_ddim_pipeline_samples_a_unet_in_one_step(distilled, tmp_path):
    trainer, _ = distilled("unet")
    pipeline = pipeline_of(silent(tmp_path / "out", trainer))
    assert type(pipeline) is diffusers.DDIMPipeline
    pipeline.scheduler.set_timesteps(1)
    assert pipeline.scheduler.timesteps.tolist() == [300]
    images = pipeline(batch_size=3, generator=seeded(5), num_inference_steps=1, output_type="pt").images
    same(images, load(tmp_path / "out")(noise((3, 3, 8, 8))))
    other = diffusers.DDPMPipeline(pipeline.unet, pipeline.scheduler)
    images = other(batch_size=3, generator=seeded(5), num_inference_steps=1, output_type="np").images
    same(torch.from_numpy(images).permute(0, 3, 1, 2), load(tmp_path / "out")(noise((3, 3, 8, 8))))


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("index", [0, 400, 999])
def test_every_prediction_type_and_index_and_zero_terminal_snr(tmp_path, prediction, index):
    form = {"prediction_type": prediction, "rescale_betas_zero_snr": prediction == "v_prediction"}
    scheduler = diffusers.DDIMScheduler(**form, beta_schedule="squaredcos_cap_v2")
    teacher = teachers.load(folders.unet(tmp_path / "teacher", scheduler))
    trainer = trained(teacher, steps=0, t_star=teacher.time(index))
    pipeline = pipeline_of(silent(tmp_path / "out", trainer))
    images = pipeline(batch_size=2, generator=seeded(5), num_inference_steps=1, output_type="pt").images
    same(images, load(tmp_path / "out")(noise((2, 3, 8, 8))))


def test_dit_pipeline_samples_in_one_step(distilled, tmp_path):
    trainer, _ = distilled("dit")
    pipeline = pipeline_of(silent(tmp_path / "out", trainer))
    assert type(pipeline) is diffusers.DiTPipeline
    labels = [3, 0, 9]
    images = pipeline(labels, generator=seeded(5), guidance_scale=1.0, num_inference_steps=1, output_type="pt").images
    loaded = load(tmp_path / "out")
    same(images, loaded.decode(loaded(noise((3, 4, 8, 8)), torch.tensor(labels))))


@needs_text
@pytest.mark.parametrize(
    ("name", "input_scale", "kind", "scheduler"),
    [
        ("text_unet", 1.0, "StableDiffusionPipeline", "DDIMScheduler"),
        ("text_unet", None, "StableDiffusionPipeline", "EulerDiscreteScheduler"),
        ("sd3", 1.0, "StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_a_pipeline_of_text_samples_in_one_step(distilled, tmp_path, name, input_scale, kind, scheduler):
    trainer, _ = distilled(name)
    if input_scale is None:
        trainer = trained(trainer.teacher, prompts=trainer.teacher.encode(["a"]), steps=1, input_scale=None)
    # diffusers wants to be told of a T5 that is not there, as for the teacher's own folder.
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipeline = pipeline_of(silent(tmp_path / "out", trainer), **without_t5)
    assert (type(pipeline).__name__, type(pipeline.scheduler).__name__) == (kind, scheduler)
    prompts, z = ["a b", "c"], noise((2, 4, 8, 8))
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt", "height": 16, "width": 16}
    images = pipeline(prompts, latents=z, **options).images
    loaded = load(tmp_path / "out")
    same(images, loaded.decode(loaded(z, loaded.encode(prompts))))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"t_star": 0.30012}, "schedulers know whole ones"),
        ({"input_scale": None}, "train with input_scale = 1"),
        ({"input_scale": 0.5}, "not by 0.5"),
        ({}, "gives labels"),
    ],
)
def test_what_stock_diffusers_cannot_do_is_said_and_it_cannot_load_it(distilled, tmp_path, changes, said):
    labelled = {} if changes else {"num_class_embeds": 4}
    trainer = trained(teachers.load(folders.unet(tmp_path / "teacher", **labelled)), steps=1, **changes)
    with pytest.warns(NotForStock, match=said):
        path = export(trainer, tmp_path / "out")
    assert not (path / "model_index.json").exists()
    assert torch.equal(load(path).sample(2), trainer.generate(2))


def test_from_a_checkpoint_with_its_teacher(distilled, tmp_path):
    trainer, _ = distilled("unet")
    trainer.save(tmp_path / "step.pt")
    with pytest.raises(ValueError, match="holds no teacher"):
        export(tmp_path / "step.pt", tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export(trainer, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    path = export(tmp_path / "step.pt", tmp_path / "out", teacher=trainer.teacher)
    assert torch.equal(load(path).sample(2), trainer.generate(2))


def test_nothing_in_the_folder_says_where_the_teacher_lay(distilled, tmp_path):
    trainer, _ = distilled("dit")
    path = export(trainer, tmp_path / "out")
    for name in ("model_index.json", "emd_fast.json", "transformer/config.json"):
        assert str(trainer.teacher.folder.root) not in (path / name).read_text()
    assert json.loads((path / "emd_fast.json").read_text())["generator"]["steps"] == 2
