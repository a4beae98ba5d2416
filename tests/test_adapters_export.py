"""An adapter on disk: merged into a pipeline or a file, and as a LoRA file that stock pipelines load."""

import json

import pytest
import torch
from safetensors import safe_open
from test_diffusers_export import folders, needs_text, noise, pipeline_of, same, silent, teachers, trained

from emd_fast import EMDTrainer
from emd_fast.cli import commands
from emd_fast.export.pipeline import export, load
from emd_fast.train import adapters

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
LORA = {"adapter_rank": 4, "adapter_alpha": 8.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (folder of the teacher, trainer after two steps)."""
    found = {}

    def make(name):
        if name not in found:
            folder = getattr(folders, name)(tmp_path_factory.mktemp(name) / "teacher")
            teacher = teachers.load(folder)
            prompts = teacher.encode(["a b", "c"]) if name != "unet" else None
            targets = [] if name != "unet" else ["to_q", "to_v", "conv1", "conv_in"]
            trainer = trained(teacher, prompts=prompts, adapter_targets=targets, **LORA)
            found[name] = folder, trainer
        return found[name]

    return make


@pytest.mark.parametrize("format", ["diffusers", "safetensors"])
def test_a_merged_adapter_samples_as_the_trainer(made, tmp_path, format):
    _, trainer = made("unet")
    for ema in (True, False):
        loaded = load(silent(tmp_path / f"{ema}", trainer, format=format, ema=ema))
        assert not adapters.has_adapter(loaded)
        torch.testing.assert_close(loaded.sample(3), trainer.generate(3, ema=ema), **CLOSE)
    base = trainer.teacher.denoise(noise((3, 3, 8, 8)), torch.full((3,), trainer.config.t_star))
    assert (base - loaded(noise((3, 3, 8, 8)))).abs().max() > 1e-2  # the adapter does something
    assert adapters.has_adapter(trainer.generator)  # and the trainer keeps it


def test_a_merged_adapter_in_bfloat16_is_float32_on_disk(tmp_path):
    teacher = teachers.load(folders.unet(tmp_path / "teacher"))
    trainer = trained(teacher, precision="bfloat16", adapter_targets=["conv1"], **LORA)
    loaded = load(silent(tmp_path / "out", trainer))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    mine, its = loaded.sample(3), trainer.generate(3)
    assert ((mine - its).square().mean() / its.square().mean()).sqrt() < 0.02


@needs_text
@pytest.mark.parametrize("name", ["stable_diffusion", "sd3"])
def test_stock_pipelines_load_the_lora_and_sample_as_the_trainer(made, tmp_path, name):
    folder, trainer = made(name)
    out = silent(tmp_path / "lora", trainer, format="lora")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "pytorch_lora_weights.safetensors", "scheduler"]
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipeline = pipeline_of(folder, **without_t5)
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    pipeline.scheduler = getattr(diffusers, scheduler).from_pretrained(out, subfolder="scheduler")
    prompts, z = ["a b", "c"], noise((2, 4, 8, 8))
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "pt", "height": 16, "width": 16}
    before = pipeline(prompts, latents=z, **options).images
    pipeline.load_lora_weights(out)
    images = pipeline(prompts, latents=z, **options).images
    with torch.no_grad():
        ours = trainer.ema.module(z, trainer.teacher.encode(prompts))
        same(images, trainer.teacher.decode(ours))
    assert (images - before).abs().max() > 1e-3


@needs_text
def test_the_lora_file_has_the_names_of_peft_and_its_alpha(made, tmp_path):
    _, trainer = made("stable_diffusion")
    out = silent(tmp_path / "lora", trainer, format="lora", ema=False)
    with safe_open(out / "pytorch_lora_weights.safetensors", "pt") as file:
        told, names = json.loads(file.metadata()["lora_adapter_metadata"]), set(file.keys())
    assert (told["unet.r"], told["unet.lora_alpha"]) == (4, 8.0)
    assert names == {f"unet.{layer}.lora_{x}.weight" for layer in told["unet.target_modules"] for x in "AB"}
    card = (out / "README.md").read_text()
    assert trainer.teacher_facts["sha256"] in card and "StableDiffusionPipeline" in card and str(tmp_path) not in card


@needs_text
def test_a_lora_of_a_quantised_base_goes_with_the_weights_as_they_came(tmp_path):
    pytest.importorskip("torchao")
    teacher = teachers.load(folders.stable_diffusion(tmp_path / "teacher"))
    trainer = trained(teacher, prompts=teacher.encode(["a b", "c"]), base_dtype="int8", **LORA)
    out = silent(tmp_path / "lora", trainer, format="lora")
    assert "| base in training | int8, without gradients |" in (out / "README.md").read_text()
    pipeline = pipeline_of(tmp_path / "teacher")
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    pipeline.scheduler = getattr(diffusers, scheduler).from_pretrained(out, subfolder="scheduler")
    pipeline.load_lora_weights(out)
    z = noise((2, 4, 8, 8))
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "height": 16, "width": 16}
    found = pipeline(["a b", "c"], latents=z, **options).images
    with torch.no_grad():
        ours = trainer.ema.module(z, trainer.teacher.encode(["a b", "c"]))
    error = ((found - ours).norm() / ours.norm()).item()
    assert 1e-5 < error < 0.05  # the rounding of the base


def test_what_is_no_lora_is_refused(made, tmp_path):
    whole = trained(teachers.load(folders.unet(tmp_path / "teacher")), steps=0)
    with pytest.raises(ValueError, match="has no adapter: train it with adapter_rank"):
        export(whole, tmp_path / "out", "lora")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export(made("unet")[1], tmp_path / "mine", "lora")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_the_command_line(tmp_path, capsys):
    folder = folders.unet(tmp_path / "teacher")
    words = "--steps 2 --batch-size 3 --langevin-steps 1 --t-star 0.3003003 --input-scale 1 --adapter-rank 2"
    more = ["--teacher", str(folder), "--adapter-targets", '["to_q", "conv1"]', "--out", str(tmp_path / "run")]
    assert commands.main(["distill", "pretrained", *words.split(), *more]) == 0
    assert commands.main(["export", str(tmp_path / "run"), str(tmp_path / "lora"), "--lora"]) == 0
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    assert commands.main(["export", str(tmp_path / "run"), str(tmp_path / "a.safetensors"), "--lora"]) == 2
    assert "--lora writes a folder" in capsys.readouterr().err
    saved = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file())
    teacher = teachers.load(folder)
    assert saved < sum(p.nbytes for p in teacher.parameters())
    EMDTrainer.resume(next((tmp_path / "run" / "checkpoints").glob("step-*")), teacher)
