"""Tables of encoded prompts: in bfloat16, several tensors a prompt, with a negative prompt as null condition."""

import re

import pytest
import torch
from helpers import assert_same
from torch.utils._pytree import tree_map

from emd_fast.config import ConfigError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import architectures  # noqa: E402
from test_architectures import pipeline_of  # noqa: E402

from emd_fast.tasks import encoded  # noqa: E402
from emd_fast.teachers import diffusers as teachers  # noqa: E402
from emd_fast.train import conditions  # noqa: E402

XL, FLUX, QWEN = "UNet2DConditionModel, XL", "FluxTransformer2DModel", "QwenImageTransformer2DModel"
CONSTANTS = {"time_ids", "guidance"}  # numbers that bfloat16 would round
TEXTS = ["a b c d", "e", "f g"]


def rounded(key, value):
    """A tensor of a condition as a table in bfloat16 has it."""
    return value.bfloat16() if value.is_floating_point() and key not in CONSTANTS else value


@pytest.mark.parametrize("name", architectures.ROWS)
def test_every_network_takes_embeddings_in_bfloat16_as_the_numbers_that_they_are(tmp_path, name):
    row = architectures.ROWS[name]
    pipeline_of(row).save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    cond = row.cond(architectures.LENGTHS)
    many = isinstance(cond, dict)
    cond = {key: rounded(key, value) for key, value in cond.items()} if many else rounded("", cond)
    x, t = torch.randn(2, *teacher.sample_shape), torch.tensor([0.3, 0.7])
    whole = tree_map(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, cond)
    with torch.no_grad():
        assert_same(teacher(x, t, cond), teacher(x, t, whole))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def made(name):
        row, path = architectures.ROWS[name], tmp_path_factory.mktemp("teacher")
        pipeline_of(row, **row.text()).save_pretrained(path)
        return path

    return made


@pytest.mark.parametrize("name", [XL, FLUX, QWEN])
def test_a_table_in_bfloat16_has_the_rounded_embeddings_and_half_the_bytes(tmp_path, folder, name):
    path, row = folder(name), architectures.ROWS[name]
    (tmp_path / "p.txt").write_text("\n".join(TEXTS))
    tables, sizes = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        (tmp_path / str(dtype)).mkdir()
        teacher = teachers.load(path, prompt_dtype=dtype, **row.size)
        made = encoded.encoded(teacher, tmp_path / "p.txt", tmp_path / str(dtype), negative_prompt="g h i")
        tables[dtype], sizes[dtype] = conditions.Mapped(made), made.stat().st_size
    assert sizes[torch.bfloat16] < 0.6 * sizes[torch.float32]  # header, masks and constants are as before
    rows, half = (table[torch.tensor([2, 0])] for table in tables.values())
    assert rows.keys() == half.keys() == teacher.takes.tensors.keys() and len(rows) > 1
    for each, ours in ((rows, half), (tables[torch.float32].null_cond, tables[torch.bfloat16].null_cond)):
        for key, value in each.items():
            assert_same(ours[key], rounded(key, value))
    assert_same(half["prompt_embeds"], teacher.encode(["f g", "a b c d"])["prompt_embeds"][:, : rows_of(half)])
    null = teacher.encode(["g h i"])
    for key, value in tables[torch.bfloat16].null_cond.items():
        assert_same(value, null[key])
    assert not torch.equal(null["prompt_embeds"], teacher.encode([""])["prompt_embeds"])
    with torch.no_grad():  # guided by rows and a null condition of another length
        teacher.null_cond = tables[torch.bfloat16].null_cond
        x, t = torch.randn(2, *teacher.sample_shape), torch.tensor([0.3, 0.7])
        guided = teacher.guided(x, t, half, 3.0)
        teacher.null_cond = tables[torch.float32].null_cond
        whole = teacher.guided(x, t, rows, 3.0)
    assert (guided - whole).norm() < 0.03 * whole.norm()


def rows_of(cond):
    return cond["prompt_embeds"].shape[1]


def test_a_table_of_another_dtype_or_negative_prompt_is_not_taken_over(tmp_path, folder, monkeypatch):
    path, row = folder(FLUX), architectures.ROWS[FLUX]
    (tmp_path / "p.txt").write_text("a\n")

    def made(dtype=torch.float32, **options):
        teacher = teachers.load(path, prompt_dtype=dtype, **row.size)
        return conditions.Mapped(encoded.encoded(teacher, tmp_path / "p.txt", tmp_path, **options))

    assert made()[torch.tensor([0])]["prompt_embeds"].dtype == torch.float32
    assert made(torch.bfloat16)[torch.tensor([0])]["prompt_embeds"].dtype == torch.bfloat16
    empty, other = made().null_cond, made(negative_prompt="b").null_cond
    assert not torch.equal(empty["prompt_embeds"], other["prompt_embeds"])
    monkeypatch.setattr(encoded.run_checkpoints, "found", lambda folder: [folder])  # the run has begun
    with pytest.raises(ConfigError, match=r"the negative prompt is not that .* was made with"):
        made(negative_prompt="c")
    assert_same(made(negative_prompt="b").null_cond["prompt_embeds"], other["prompt_embeds"])


def test_from_the_command_line(call, refused, tmp_path, folder):
    path = folder(FLUX)
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    words = ["distill", "--teacher", path, "--steps=1", "--batch-size=2", "--langevin-steps=1", "--height=64"]
    words += [
        "--width=64",
        "--t-star=1",
        "--input-scale=1",
        "--lr-warmup=0",
        "--guidance=2",
        "--negative-prompt",
        "g h",
    ]
    half = ["--pretrained.prompt-dtype", "bfloat16"]
    code, _, err = call(*words, *half, "--prompts", "prompts.txt", "--out", "run")
    assert code == 0, err
    table = conditions.Mapped(tmp_path / "run" / "prompts.safetensors")
    cond = table[torch.tensor([1])]
    assert cond["prompt_embeds"].dtype == cond["pooled_projections"].dtype == torch.bfloat16
    teacher = teachers.load(path, height=64, width=64, prompt_dtype=torch.bfloat16)
    assert_same(table.null_cond["prompt_embeds"], teacher.encode(["g h"])["prompt_embeds"])
    conditions.save(tmp_path / "table.safetensors", cond, table.null_cond)
    said = "negative_prompt is for prompts as text, and table.safetensors has its own null condition"
    refused(2, said, *words, "--prompts", "table.safetensors", "--out", "other")
    refused(2, "prompt_dtype must be one of", *words, "--pretrained.prompt-dtype", "int8", "--prompts", "prompts.txt")
    code, _, err = call(*words[:-1], "g", *half, "--prompts", "prompts.txt", "--out", "run", "--steps=2")
    assert code == 2 and re.search(r"pretrained\.negative_prompt", err)
