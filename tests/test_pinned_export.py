"""Generators of several calls in stock pipelines: schedulers pinned to the rungs make the samples of the trainer."""

import json
import warnings

import pytest
import test_architectures as each
import torch
from test_architectures import architectures
from test_diffusers_export import diffusers, folders, needs_text, pipeline_of, same, teachers, trained

from emd_fast.export.pipeline import NotForStock, example, export, load
from emd_fast.teachers.diffusers import stock

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
SIZE = {"guidance_scale": 1.0, "output_type": "pt", "height": 16, "width": 16}
SCHEDULERS = {"stable_diffusion": "LCMScheduler", "sd3": "FlowMatchEulerDiscreteScheduler"}
MODULES = ("scheduling_lcm", "scheduling_flow_match_euler_discrete")
WITHOUT_T5 = {"stable_diffusion": {}, "sd3": {"text_encoder_3": None, "tokenizer_3": None}}
INDICES, LEVELS = (960, 700, 420, 90), [1.0, 0.7, 0.4, 0.15]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """name -> (folder of the teacher, trainer of four calls with whole weights or an adapter, after two steps)."""
    found = {}

    def make(name, **changes):
        key = name, *changes
        if key not in found:
            folder = getattr(folders, name)(tmp_path_factory.mktemp(name) / "teacher")
            teacher = teachers.load(folder)
            rungs = LEVELS if name == "sd3" else [teacher.time(i) for i in INDICES]
            found[key] = folder, trained(teacher, prompts=teacher.encode(["a b", "c"]), rungs=rungs, **changes)
        return found[key]

    return make


def silent(trainer, out, *rest):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return export(trainer, out, *rest)


def drawn(monkeypatch, calls):
    """z of each call. The schedulers draw those after the first; what they draw after the last call is not used."""
    made = torch.randn(calls, 2, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    later = iter([*made[1:], torch.full_like(made[0], 1e3)])
    for module in MODULES:
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda shape, **options: next(later))
    return list(made)


@needs_text
@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_stock_pipeline_makes_the_samples_of_the_trainer(made, monkeypatch, tmp_path, name, calls):
    _, trainer = made(name)
    out = silent(trainer, tmp_path / "out")
    pipeline = pipeline_of(out, **WITHOUT_T5[name])
    assert type(pipeline.scheduler).__name__ == SCHEDULERS[name]
    noises, prompts = drawn(monkeypatch, calls), ["a b", "c"]
    ((given, times),) = stock.times_of(trainer.generator).items()
    images = pipeline(prompts, latents=noises[0], **{given: times[:calls]}, **SIZE).images
    with torch.no_grad():
        ours = trainer.ema.module.sample(noises, trainer.teacher.encode(prompts))[-1]
    same(images, trainer.teacher.decode(ours))
    loaded = load(out)
    torch.testing.assert_close(loaded.samples(noises, loaded.encode(prompts))[-1], ours, rtol=0, atol=1e-5)


@needs_text
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_stock_pipeline_with_the_lora_makes_the_samples_of_the_trainer(made, monkeypatch, tmp_path, name):
    pytest.importorskip("peft")
    folder, trainer = made(name, adapter_rank=4)
    out = silent(trainer, tmp_path / "lora", "lora")
    pipeline = pipeline_of(folder, **WITHOUT_T5[name])
    pipeline.scheduler = getattr(diffusers, SCHEDULERS[name]).from_pretrained(out, subfolder="scheduler")
    pipeline.load_lora_weights(out)
    noises, prompts = drawn(monkeypatch, 4), ["a b", "c"]
    images = pipeline(prompts, latents=noises[0], **stock.times_of(trainer.generator), **SIZE).images
    with torch.no_grad():
        ours = trainer.ema.module.sample(noises, trainer.teacher.encode(prompts))[-1]
        base = stock_generator(trainer).sample(noises, trainer.teacher.encode(prompts))[-1]
    same(images, trainer.teacher.decode(ours))
    assert (ours - base).abs().max() > 1e-3  # the adapter does something
    card = (out / "README.md").read_text()
    assert "tags: [lora, few-step, em-distillation]" in card and "pipeline.load_lora_weights(FOLDER)" in card


def stock_generator(trainer):
    """The generator before its training: the teacher at the rungs."""
    return type(trainer.generator)(trainer.teacher, trainer.generator.times, 1.0)


@needs_text
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_card_and_the_printed_lines_say_how_to_sample(made, tmp_path, name):
    _, trainer = made(name)
    out = silent(trainer, tmp_path / "out")
    card = (out / "README.md").read_text()
    times = "sigmas=[1.0, 0.7, 0.4, 0.15]" if name == "sd3" else "timesteps=[960, 700, 420, 90]"
    for said in (f"| {times}, guidance_scale=1.0, height=16, width=16 |", "| network calls | 4 |", SCHEDULERS[name]):
        assert said in card
    assert trainer.teacher_facts["sha256"] in card and str(tmp_path) not in card
    (out / "README.md").write_text(card + "edited\n")
    load(out)
    found = {}
    if name != "sd3":  # whose T5 is missing here
        exec(example(trainer, out).replace(".images[0]", ""), {}, found)
        assert found["made"].images[0].size == (16, 16)
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", SCHEDULERS[name]]


@pytest.mark.parametrize("name", [name for name in architectures.ROWS if not name.startswith(("Wan", "LTX"))])
def test_every_pipeline_that_takes_times_samples_on_the_rungs(tmp_path, monkeypatch, name):
    row = architectures.ROWS[name]
    pipeline = each.pipeline_of(row)
    pipeline.save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    rungs = [0.9, 0.4] if teacher.parametrization == "flow" else [teacher.time(i) for i in (900, 300)]
    trainer = each.trained(teacher, row, steps=1, rungs=rungs)
    out, cond = silent(trainer, tmp_path / "out"), row.cond(architectures.LENGTHS)
    stock_one = type(pipeline).from_pretrained(
        out, **{part: None for part, value in pipeline.components.items() if value is None}
    )
    stock_one.set_progress_bar_config(disable=True)
    noises, generator = [], torch.Generator().manual_seed(3)

    def draw(shape, dtype, **options):
        noises.append(torch.randn(shape, generator=generator, dtype=dtype))
        return noises[-1]

    for module in MODULES:
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", draw)
    call = {**row.call(cond, None), **stock.times_of(trainer.generator)}
    found, _ = each.sampled(stock_one, row, call, steps=2)
    assert len(found) == 2
    (_, _, z, _), (_, _, _, x) = found
    loaded = load(out)
    ours = loaded.samples([row.latents(stock_one, noise) for noise in (z, noises[0])], cond)[-1]
    torch.testing.assert_close(row.latents(stock_one, x), ours, rtol=0, atol=5e-5 * ours.abs().max().item())


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        ("unet", {}, "DDIMPipeline takes no timesteps, by which it would get the 2 noise levels"),
        ("dit", {}, "DiTPipeline takes no timesteps"),
        ("stable_diffusion", {"input_scale": None}, "takes z as it is, and input_scale is 0.9"),
        ("stable_diffusion", {"rungs": (600.4, 300)}, "schedulers know whole ones"),
        ("stable_diffusion", {"rungs": (600, 0)}, "returns its input at index 0"),
    ],
)
def test_a_scheduler_that_cannot_be_pinned_is_said_in_one_line(tmp_path, make, changes, said):
    if make == "stable_diffusion" and folders.transformers_missing():
        pytest.skip(folders.transformers_missing())
    teacher = teachers.load(getattr(folders, make)(tmp_path / "teacher"))
    prompts = teacher.encode(["a"]) if make == "stable_diffusion" else None
    rungs = [i / 999 for i in changes.pop("rungs", (900, 300))]
    trainer = trained(teacher, prompts=prompts, steps=0, rungs=rungs, **changes)
    with pytest.warns(NotForStock, match=said) as warned:
        out = export(trainer, tmp_path / "out")
    assert "\n" not in str(warned[0].message)
    assert not (out / "model_index.json").exists() and not (out / "README.md").exists()
    cond = None if prompts is None else trainer.prompts[torch.tensor([0, 0])]
    for calls in (1, 2):
        assert torch.equal(load(out).sample(2, cond, calls=calls), trainer.generate(2, cond, calls=calls))
