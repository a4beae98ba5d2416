"""The recipes for Flux.1 dev and Wan 2.1: planned on the published configurations, and run on tiny folders."""

import json
from importlib import resources

import pytest

from emd_fast import config

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import architectures  # noqa: E402
from test_architectures import PUBLISHED, pipeline_of  # noqa: E402

MODELS = {"flux": "Flux.1 dev", "wan": "Wan 2.1 1.3B"}
TINY = "--steps=2 --batch-size=2 --lr-warmup=0 --langevin-steps=1 --compile=false --emd.average.ema=0".split()


def planned(call, tmp_path, recipe, *words):
    """GiB of a device in each mode."""
    kind, model, _ = PUBLISHED[MODELS[recipe]]
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind, **model}))
    code, out, err = call("plan", recipe, "--teacher", tmp_path, "--devices=8", "--device-memory=80", *words)
    assert code == 0, err
    table = out[out.index("8 devices, GiB on each") :].splitlines()
    (total,) = (line.removeprefix("a device, in all") for line in table if line.startswith("a device, in all"))
    modes = next(line for line in table if "replicate" in line).split()
    return dict(zip((word for word in modes if word != "*"), total.split(), strict=True))


@pytest.mark.slow  # the modules of the networks are built
@pytest.mark.parametrize("recipe", MODELS)
def test_the_memory_that_a_recipe_states_is_that_of_its_plan(call, tmp_path, recipe):
    text = (resources.files("emd_fast") / "recipes" / f"{recipe}.toml").read_text("utf-8")
    totals = planned(call, tmp_path, recipe)
    settings = config.load(recipe)
    assert set(totals) == {"fsdp", "replicate"}
    for total in totals.values():
        assert f"{total} GiB" in text
    if recipe == "flux":
        assert f"{planned(call, tmp_path, recipe, '--parallel=fsdp', '--gather=block')['fsdp']} GiB" in text
    assert float(totals[settings.emd.parallelism.parallel]) == min(map(float, totals.values()))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", MODELS)
def test_a_recipe_runs_on_a_tiny_folder(call, tmp_path, recipe):
    if recipe == "flux":
        pytest.importorskip("peft")
    name = {"flux": "FluxTransformer2DModel", "wan": "WanTransformer3DModel"}[recipe]
    row = architectures.ROWS[name]
    pipeline_of(row, **row.text()).save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    sizes = {"flux": "[[64, 96], [96, 64]]", "wan": "[[64, 96, 9], [96, 64, 9]]"}[recipe]
    words = ["--teacher", "teacher", "--prompts", "prompts.txt", "--sizes", sizes, "--out", "run", *TINY]
    code, _, err = call("distill", recipe, *words)
    assert code == 0, err
    assert call("export", "run", "one-step")[0] == 0
    assert (tmp_path / "one-step" / "model_index.json").exists()  # the stock pipeline samples it
