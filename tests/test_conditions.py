"""Tables of conditions in files: which are refused, in one line and before anything is trained."""

from __future__ import annotations

import os

import diffusers_folders as folders
import pytest
import torch
from safetensors.torch import save_file

from emd_fast import Denoiser, schedules
from emd_fast.cli import commands
from emd_fast.teachers.small_unet import SmallUNet
from emd_fast.train import conditions

GOOD = torch.arange(30.0).reshape(5, 2, 3)


def write(tensors, path):
    save_file({name: value.clone() for name, value in tensors.items()}, path)


def with_value(value, dtype=torch.float32):
    rows = GOOD.clone()
    rows[3, 1, 0] = value
    return {"cond": rows.to(dtype)}


REFUSED = {
    "a scalar": ({"cond": torch.tensor(1.0)}, r"'cond' has shape \(\), a row for each condition"),
    "a scalar beside rows": ({"a": GOOD, "b": torch.tensor(1.0)}, r"'b' has shape \(\)"),
    "no row": ({"cond": GOOD[:0]}, r"'cond' has shape \(0, 2, 3\)"),
    "no value": ({"cond": GOOD[..., :0]}, r"'cond' has shape \(5, 2, 0\)"),
    "no tensor": ({}, "it has 0 tensors of conditions"),
    "a null condition alone": ({"null.cond": GOOD[:1]}, "it has 0 tensors of conditions"),
    "many tensors": ({f"t{i}": torch.ones(2, 1) for i in range(99)}, "it has 99 tensors"),
    "two sizes": ({"a": GOOD, "b": GOOD[:4]}, r"tensors of one batch size, got sizes \[4, 5\]"),
    "a dtype of 8 bits": ({"cond": GOOD.to(torch.float8_e4m3fn)}, "is of 'F8_E4M3': convert it to float32"),
    "complex numbers": ({"cond": GOOD.to(torch.complex64)}, "convert it to float32"),
    "NaN": (with_value(float("nan")), "row 3 of 'cond' holds NaN or infinite values: remove it"),
    "an infinite value": (with_value(-float("inf"), torch.float16), "row 3 of 'cond' holds NaN or inf"),
    "NaN in the null condition": ({"cond": GOOD, "null.cond": GOOD[:1] / 0}, "row 0 of 'null.cond' holds NaN"),
    "a longer null condition": (
        {"cond": GOOD, "null.cond": torch.ones(1, 4, 3)},
        r"'null.cond' F32 \(1, 2, 3\) as a r",
    ),
    "two null conditions": ({"cond": GOOD, "null.cond": GOOD[:2]}, "the null condition must be"),
    "a scalar null condition": ({"cond": GOOD, "null.cond": torch.tensor(1.0)}, "the null condition must be"),
    "a null condition of another dtype": (
        {"cond": GOOD, "null.cond": GOOD[:1].half()},
        r"got 'null.cond' F16 \(1, 2, 3",
    ),
    "a null condition of another name": ({"cond": GOOD, "null.x": GOOD[:1]}, "the null condition must be"),
    "half a null condition": ({"a": GOOD, "b": GOOD, "null.a": GOOD[:1]}, "the null condition must be"),
    "a name with a line": ({"a\nb": torch.tensor(1.0)}, r"'a\\nb' has shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_no_table(tmp_path, name):
    tensors, said = REFUSED[name]
    write(tensors, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=said) as error:
        conditions.Mapped(tmp_path / "t.safetensors")
    assert str(tmp_path / "t.safetensors") in str(error.value) and "\n" not in str(error.value)


def test_rows_are_checked_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "_CHUNK", 12)
    write({**with_value(float("nan")), "b": GOOD}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match="row 3 of 'cond'"):
        conditions.Mapped(tmp_path / "t.safetensors")
    assert len(conditions.Mapped(tmp_path / "t.safetensors", finite=True)) == 5


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("a prompt\n")
    for path, said in {"fifo": "not a regular file", ".": "not a regular file", "none": "no such", "text": ""}.items():
        with pytest.raises(ValueError, match=f"cannot read the conditions in .*{said}"):
            conditions.Mapped(tmp_path / path)


@pytest.mark.parametrize(
    ("cond", "said"),
    [
        (torch.tensor(1.0), "a row for each condition"),
        (GOOD[:0], "a row for each condition"),
        ({"a": GOOD, "b": GOOD[:4]}, "one batch size"),
        (with_value(float("nan")), "row 3 of 'leaf 0' holds NaN"),
    ],
)
def test_tables_in_memory_have_the_same_rules(cond, said):
    with pytest.raises(ValueError, match=said):
        conditions.table(cond)


@pytest.mark.parametrize(
    ("cond", "null", "said"),
    [
        (torch.tensor(1.0), None, "a row for each"),
        ({"a": GOOD, "b": GOOD[:4]}, None, "one batch size"),
        (GOOD, GOOD[:1, :1], "the null condition must be"),
        (GOOD, GOOD[:2], "the null condition must be"),
        (GOOD, GOOD[:1].half(), "the null condition must be"),
        (GOOD, {"x": GOOD[:1]}, "the null condition must be"),
    ],
)
def test_what_is_no_table_is_not_saved(tmp_path, cond, null, said):
    with pytest.raises(ValueError, match=said):
        conditions.save(tmp_path / "t.safetensors", cond, null)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", conditions._CODES, ids=str)
def test_every_dtype_is_read_as_it_was_written(tmp_path, dtype):
    cond = {"a": GOOD.to(dtype), "b": torch.arange(5), "c": GOOD.bfloat16()[:, 0]}
    null = {name: value[:1] for name, value in cond.items()}
    conditions.save(tmp_path / "t.safetensors", cond, null)
    table = conditions.Mapped(tmp_path / "t.safetensors")
    for name, value in cond.items():
        assert (
            torch.equal(table[torch.tensor([4, 0])][name], value[[4, 0]])
            and table[torch.arange(5)][name].dtype == value.dtype
        )
        assert torch.equal(table.null_cond[name], value[:1])


# Tables that are read, and that the teacher does not take -----------------------------------------------------------


def labelled():
    """A teacher of one's own that takes labels below 4."""
    return Denoiser(
        SmallUNet(3, channels=4, num_classes=4), schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(3, 8, 8)
    )


def text(*shape, dtype=torch.float32):
    return {"cond": torch.ones(shape).to(dtype)}


def pooled(tokens, width, dtype=torch.float32):
    return {"prompt_embeds": tokens, "pooled_projections": torch.ones(len(tokens), width).to(dtype)}


TOKENS = torch.ones(5, 3, 16)
NOT_TAKEN = {
    "another width": ("text", text(5, 3, 7), "takes text embeddings (B, tokens, 8)"),
    "integers": ("text", text(5, 3, 8, dtype=torch.int64), "got a int64 tensor (1, 3, 8)"),
    "rows without tokens": ("text", text(5, 8), "got a float32 tensor (1, 8)"),
    "a dict": ("text", {"a": TOKENS, "b": TOKENS}, "takes text embeddings"),
    "no pooled ones": ("sd3", text(5, 3, 16), "takes a dict of prompt_embeds"),
    "another pooled width": ("sd3", pooled(TOKENS, 15), "pooled_projections (B, 16)"),
    "integers as pooled ones": ("sd3", pooled(TOKENS, 16, torch.int64), "pooled_projections (B, 16)"),
    "tokens of four dimensions": ("sd3", pooled(TOKENS[..., None], 16), "pooled_projections (B, 16)"),
    "labels that are floats": ("own", {"cond": torch.ones(5)}, "labels must be int64"),
    "a label that is too large": ("own", {"cond": torch.tensor([0, 1, 9, 2])}, "labels must be in [0, 4)"),
    "a label below 0": ("own", {"cond": torch.tensor([0, 1, -2])}, "labels must be in [0, 4)"),
    "conditions for a teacher without": ("plain", text(5, 3, 8), "takes no condition"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    pytest.importorskip("diffusers")
    path = tmp_path_factory.mktemp("teachers")
    folders.bare_text_unet(path / "text")
    folders.bare_sd3(path / "sd3")
    folders.unet(path / "plain")
    return {**{name: [str(path / name)] for name in ("text", "sd3", "plain")}, "own": ["test_conditions:labelled"]}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_table_that_the_teacher_does_not_take_ends_the_command(made, tmp_path, name, capsys):
    teacher, tensors, said = NOT_TAKEN[name]
    write(tensors, tmp_path / "t.safetensors")
    words = ["distill", "--teacher", *made[teacher], "--prompts", str(tmp_path / "t.safetensors")]
    code = commands.main([*words, "--out", str(tmp_path / "run"), "--steps=1", "--batch-size=2"])
    err = capsys.readouterr().err.strip()
    assert code == 2 and said in err and "t.safetensors" in err and len(err.splitlines()) == 1, err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_table_that_is_none_ends_the_command(made, tmp_path, capsys):
    write(with_value(float("nan")), tmp_path / "t.safetensors")
    words = ["distill", "--teacher", *made["text"], "--prompts", str(tmp_path / "t.safetensors")]
    assert commands.main([*words, "--out", str(tmp_path / "run"), "--steps=1"]) == 2
    err = capsys.readouterr().err.strip()
    assert "row 3 of 'cond' holds NaN" in err and len(err.splitlines()) == 1
