"""What a folder or a table of conditions cannot be: one line, before anything is encoded or trained."""

import json

import pytest
import torch
from torch.utils._pytree import tree_map

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import architectures  # noqa: E402
from test_architectures import pipeline_of  # noqa: E402

from emd_fast.tasks import encoded  # noqa: E402
from emd_fast.teachers import diffusers as teachers  # noqa: E402
from emd_fast.train import conditions  # noqa: E402

FLUX, QWEN, WAN = "FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"
WORDS = ["--t-star=1", "--input-scale=1", "--steps=1", "--batch-size=2", "--lr-warmup=0", "--out", "run"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> a tiny folder of the class, with text encoders."""
    made = {}

    def folder(name):
        if name not in made:
            row, made[name] = architectures.ROWS[name], tmp_path_factory.mktemp("teacher")
            pipeline_of(row, **row.text()).save_pretrained(made[name])
        return made[name]

    return folder


OTHERS = {  # class, what its config.json has, what is said
    "Flux.1 Fill": (
        FLUX,
        {"in_channels": 24, "out_channels": 16},
        "has in_channels 6 and out_channels 4: only as many",
    ),
    "Flux.1 Kontext of another class": (
        FLUX,
        {"_class_name": "FluxKontextTransformer2DModel"},
        "FluxKontextTransformer2DModel, which is not supported: FluxTransformer2DModel, ",
    ),
    "Wan 2.2 image to video": (WAN, {"in_channels": 36, "out_channels": 16}, "not inpainting or image to video"),
    "Wan 2.1 image to video": (WAN, {"image_dim": 1280}, "image_dim = 1280 is not supported: a text-to-video network"),
    "Qwen-Image layered": (QWEN, {"use_layer3d_rope": True}, "use_layer3d_rope = True is not supported"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_networks_with_other_inputs_are_refused_before_prompts_are_encoded(
    folders, refused, capsys, monkeypatch, tmp_path, name
):
    kind, changes, said = OTHERS[name]
    path = folders(kind) / "transformer" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), **changes}))
    monkeypatch.setattr(encoded, "encoded", None)
    (tmp_path / "prompts.txt").write_text("a\n")
    size = [f"--{key}={value}" for key, value in architectures.ROWS[kind].size.items()]
    capsys.readouterr()  # progress bars of what was saved
    try:
        words = ["distill", "--teacher", folders(kind), "--prompts", "prompts.txt", *size, *WORDS]
        refused(2, said, *words)
        if "class" in name:
            refused(2, "emd_fast/teachers/diffusers/architectures/fluxkontext.py would add it", *words)
    finally:
        path.write_text(before)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


WITHOUT = {  # what is done to the condition
    "no mask": lambda cond: cond["prompt_embeds"],
    "a mask under another name": lambda cond: {"prompt_embeds": cond["prompt_embeds"], "mask": cond["prompt_mask"]},
    "a mask of numbers": lambda cond: {**cond, "prompt_mask": cond["prompt_mask"].float()},
    "a mask of another length": lambda cond: {**cond, "prompt_mask": cond["prompt_mask"][:, :-1]},
}


@pytest.mark.parametrize("name", WITHOUT)
def test_conditions_without_their_mask_are_refused(folders, refused, capsys, tmp_path, name):
    row = architectures.ROWS[QWEN]
    folder = folders(QWEN)
    cond = WITHOUT[name](row.cond(architectures.LENGTHS))
    teacher = teachers.load(folder, **row.size)
    said = "takes a dict of prompt_embeds, prompt_mask: text embeddings (B, tokens, 24), prompt_mask bool (B, tokens)"
    with pytest.raises(ValueError) as error:
        teacher(torch.zeros(2, *teacher.sample_shape), torch.ones(2), cond)
    assert said in str(error.value) and "\n" not in str(error.value)
    conditions.save(tmp_path / "table.safetensors", cond, tree_map(lambda leaf: leaf[:1], cond))
    words = ["distill", "--teacher", folder, "--prompts", "table.safetensors", "--height=64", "--width=96", *WORDS]
    capsys.readouterr()
    refused(2, f"this teacher does not take the conditions in table.safetensors: this {QWEN} {said}", *words)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
