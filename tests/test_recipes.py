"""What the recipes for published teachers and docs/teachers.md say of them: sources, passes, memory."""

import json
import math
import re
from importlib import resources
from pathlib import Path

import pytest
import torch

from emd_fast import Denoiser, config, schedules
from emd_fast.run.plan import plan
from emd_fast.teachers.edm_networks import DhariwalUNet, EDM2UNet, SongUNet
from emd_fast.teachers.edm_networks.arguments import DhariwalArguments, EDM2Arguments, SongArguments
from emd_fast.train.average import profile
from emd_fast.train.parameter_counts import ParameterCounts
from emd_fast.train.rungs import times_of

PUBLISHED = [name for name in config.recipes() if config.load(name).task == "pretrained"]
EDM = {
    "imagenet64": (DhariwalUNet, DhariwalArguments(64, 3, 3, 1000)),
    "imagenet64-k16": (DhariwalUNet, DhariwalArguments(64, 3, 3, 1000)),
    "cifar10": (SongUNet, SongArguments(32, 3, 3, 10, augment_dim=9, channel_mult=[2, 2, 2])),
    "edm2": (EDM2UNet, EDM2Arguments(64, 3, 3, 1000)),
}
STABLE_DIFFUSION = {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "attention_head_dim": 8}
DOCS = Path(__file__).parents[1] / "docs" / "teachers.md"


def comments(recipe: str) -> str:
    text = (resources.files("emd_fast") / "recipes" / f"{recipe}.toml").read_text("utf-8")
    head = text.partition("\ntask = ")[0]
    return " ".join(line.removeprefix("#").strip() for line in head.splitlines())


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_states_its_passes_and_what_is_not_known(recipe):
    emd = config.load(recipe).emd
    # The generator, both scores and guidance in a Langevin step; the generator and the fake score in an update of it.
    forward = 2 * emd.fake_score_updates + emd.langevin_steps * (3 + (emd.guidance is not None)) + 1
    backward = emd.fake_score_updates + emd.langevin_steps + 1
    said = comments(recipe)
    found = re.search(r"(\d+) forward (?:passes )?(?:\([^)]*\) )?and (\d+) backward passes of (\d+) ", said)
    assert found is not None, said
    assert tuple(map(int, found.groups())) == (forward, backward, emd.batch_size)
    assert re.search("EMD paper were not to be had", said)
    assert "no quality was measured" in said or "Nothing of this was measured" in said


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_batches_are_large_and_taken_in_micro_batches(recipe):
    emd = config.load(recipe).emd
    assert emd.batch_size >= (64 if recipe == "wan" else 256)
    assert 0 < emd.compute.micro_batch_size < emd.batch_size
    assert emd.average.ema_profile == "half_life" and emd.optimizer.generator_lr == emd.optimizer.fake_score_lr


@pytest.mark.parametrize("recipe", EDM)
def test_the_memory_of_a_teacher_of_edm_is_that_of_the_plan(recipe):
    kind, arguments = EDM[recipe]
    with torch.device("meta"):
        teacher = Denoiser(kind(arguments), schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(3, 64, 64))
    emd, said = config.load(recipe).emd, comments(recipe)
    totals = []
    for devices in (1, 8)[: 1 if recipe == "cifar10" else 2]:
        table = plan(ParameterCounts.of(teacher, teacher, teacher), emd, devices=devices, reduced=True).table()
        totals.append(re.search(r"a device, in all +(\d+\.\d+)", table)[1])
    assert re.findall(r"([\d.]+) GiB", said) == totals


@pytest.mark.slow  # the modules of the networks are built
@pytest.mark.parametrize("recipe", ["sd15", "sd15-k8"])
def test_the_memory_of_stable_diffusion_is_that_of_the_plan(call, tmp_path, recipe):
    pytest.importorskip("diffusers")
    (tmp_path / "config.json").write_text(json.dumps({**STABLE_DIFFUSION, "sample_size": 64}))
    totals = []
    for devices in (1, 8):
        words = "--teacher", tmp_path, "--precision=bfloat16", f"--devices={devices}"
        code, out, err = call("plan", recipe, *words)
        assert code == 0, err
        totals += re.search(r"a device, in all +([\d. ]+)", out)[1].split()
    assert re.findall(r"([\d.]+) GiB", comments(recipe)) == totals


def test_the_rungs_of_stable_diffusion_are_those_that_the_recipe_states():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    schedule, emd = schedules.VP(betas.float()), config.load("sd15-4").emd
    indices = [round(999 * time) for time in times_of(emd, schedule)]
    text = (resources.files("emd_fast") / "recipes" / "sd15-4.toml").read_text("utf-8")
    assert f"# indices {indices[0]}, {indices[1]}, {indices[2]} and {indices[3]}" in text
    # t_star is at the same noise as in the recipes for EDM, and the times are those of indices from 20 to 980.
    ratios = [(-schedule.log_snr(torch.tensor([index / 999])) / 2).exp().item() for index in (625, 20, 980)]
    assert ratios == pytest.approx([2.5, emd.time_distribution.low, emd.time_distribution.high], rel=0.02)
    drawn = -schedule.log_snr(torch.arange(20, 981) / 999) / 2
    times = emd.time_distribution
    assert (times.mean, times.std) == pytest.approx((drawn.mean().item(), drawn.std().item()), abs=0.01)
    every, times = -schedule.log_snr(torch.arange(1000) / 999) / 2, emd.fake_score_time_distribution
    assert (times.mean, times.std) == pytest.approx((every.mean().item(), every.std().item()), abs=0.01)
    assert (times.low, times.high) == pytest.approx((every.exp().min().item(), every.exp().max().item()), rel=0.05)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_half_life_that_a_run_does_not_reach_is_stated(recipe):
    emd = config.load(recipe).emd
    last = profile(emd.average, emd.batch_size)(emd.steps - 1)
    reached = emd.batch_size / -math.log2(last)
    told = f"{round(reached):,}"
    text = (resources.files("emd_fast") / "recipes" / f"{recipe}.toml").read_text("utf-8")
    if reached == pytest.approx(emd.average.ema_half_life, rel=0.05):
        assert "at the end of this run" not in text
    else:
        assert f"{told} at the end of this run" in text and told in DOCS.read_text()


@pytest.mark.parametrize(
    ("recipe", "base", "changes"),
    [
        ("imagenet64-k16", "imagenet64", {"emd.langevin_steps": 16}),
        ("sd15-k8", "sd15", {"emd.langevin_steps": 8}),
        ("sd15-clip", "sd15", {"emd.guidance": 3.0}),
        ("sd15-4", "sd15-clip", {"emd.rungs": 4}),
    ],
)
def test_a_variant_is_its_base_but_for_what_it_states(recipe, base, changes):
    assert config.load(recipe) == config.load(base, changes)


VALUES = {
    "`batch_size`": lambda emd: [emd.batch_size],
    "`generator_lr`, `fake_score_lr`": lambda emd: [emd.optimizer.generator_lr],
    "`betas`": lambda emd: list(emd.optimizer.betas),
    "`grad_clip`": lambda emd: [emd.optimizer.grad_clip],
    "`ema_half_life`": lambda emd: [emd.average.ema_half_life],
    "`t_star`": lambda emd: [emd.t_star],
    "largest ratio of `time_distribution`": lambda emd: [emd.time_distribution.high],
    "`guidance`, or `embedded_guidance`": lambda emd: [emd.guidance],
    "`langevin_steps`": lambda emd: [emd.langevin_steps],
    "`fake_score_updates`": lambda emd: [emd.fake_score_updates],
}


def table_of(text: str, first: str) -> list[list[str]]:
    """The rows of the table of docs/teachers.md whose header begins with `first`."""
    lines = text[text.index(f"| {first} |") :].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in [lines[0], *lines[2:]]]


def test_the_table_of_sources_has_the_values_of_the_recipes():
    text = DOCS.read_text().partition("## Where the numbers of the recipes come from")[2]
    header, *rows = table_of(text, "key")
    letters = {row[0] for row in table_of(text, "letter")[1:]}
    assert [row[0] for row in rows] == list(VALUES)
    for key, *cells in rows:
        for cell, name in zip(cells, header[1:], strict=True):
            settings = config.load(name.strip("`"))
            value = VALUES[key](settings.emd)
            if value == [None]:
                value = [settings.pretrained.embedded_guidance]
            numbers = re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", cell.replace("0, 0.", "0 0."))
            found = [float(number.replace(",", "")) for number in numbers]
            if cell.startswith("index"):
                found = [found[0] / 999]
            assert found == ([] if value == [None] else pytest.approx(value)), (key, name, cell)
            assert set(re.findall(r"\b[A-Z]\b", cell)) <= letters
