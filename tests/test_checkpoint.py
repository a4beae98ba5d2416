from __future__ import annotations

import errno
import json
import os
import pickle
import threading

import pytest
import torch

from emd_fast.train import checkpoint
from emd_fast.train.checkpoint import CheckpointError

TENSORS = {
    "generator.net.weight": torch.arange(12.0).reshape(3, 4),
    "generator.net.count": torch.tensor(7),
    "student.empty": torch.zeros(0, 3),
    "student.half": torch.arange(4).to(torch.bfloat16),
    "generator_optimizer.net.weight.step": torch.tensor(3.0),
}


def write(path, step=3, tensors=None, **options):
    writer = checkpoint.Writer()
    writer.save(path, {**TENSORS, **(tensors or {})}, {"step": step}, **options)
    writer.wait()


# Files ----------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path):
    path = tmp_path / "a" / "x.pt"
    checkpoint.save(path, {"step": 3, "weights": {"w": torch.arange(4.0)}})
    state = checkpoint.load(path)
    assert state["step"] == 3 and torch.equal(state["weights"]["w"], torch.arange(4.0))
    assert os.listdir(path.parent) == ["x.pt"]


def test_missing_truncated_flipped_and_foreign_files_are_named(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(path)
    checkpoint.save(path, {"weights": torch.randn(1000)})
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"PK" + bytes(len(whole)), b"hello"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            checkpoint.load(path)
    torch.save({"model": torch.randn(3)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of emd_fast"):
        checkpoint.load(path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_from_another_format_version_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(checkpoint, "_VERSION", 99)
    checkpoint.save(tmp_path / "x", {}) if kind == "file" else write(tmp_path / "x")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 99"):
        checkpoint.load(tmp_path / "x")


class Bad:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bad(marker), protocol=2))
    torch.save({"format": "emd_fast checkpoint", "version": 2, "bad": Bad(marker)}, tmp_path / "zip.pt")
    for name in ("plain.pt", "zip.pt"):
        with pytest.raises(CheckpointError):
            checkpoint.load(tmp_path / name)
    assert not marker.exists()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"step": 1})
    fill_the_disk(monkeypatch)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["x.pt"]


def fill_the_disk(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_a_folder_gives_back_what_went_in(tmp_path, background):
    path = tmp_path / "runs" / "step-00000003"
    write(path, background=background)
    state = checkpoint.load(path)
    assert state["step"] == 3
    for name, tensor in TENSORS.items():
        part, _, key = name.partition(".")
        assert state[part][key].dtype == tensor.dtype and torch.equal(state[part][key], tensor), name
    into = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    checkpoint.restore(path, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in TENSORS.items())
    assert os.listdir(path.parent) == ["step-00000003"]


def test_what_changes_while_it_is_written_is_not_in_it(tmp_path, monkeypatch):
    began, go_on = threading.Event(), threading.Event()
    original = checkpoint._write_folder

    def slowly(*arguments):
        began.set()
        assert go_on.wait(30)
        original(*arguments)

    monkeypatch.setattr(checkpoint, "_write_folder", slowly)
    weight = torch.ones(5)
    writer = checkpoint.Writer()
    writer.save(tmp_path / "x", {"generator.w": weight}, {}, background=True)
    assert began.wait(30) and not (tmp_path / "x").exists()
    weight.zero_()
    go_on.set()
    writer.wait()
    assert torch.equal(checkpoint.load(tmp_path / "x")["generator"]["w"], torch.ones(5))


def test_damage_anywhere_is_named(tmp_path):
    path = tmp_path / "x"
    write(path)
    names = sorted(os.listdir(path))
    assert names == [".metadata", "__0_0.distcp", "manifest.json"]
    for name in names:
        whole = (path / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damaged in (None, b"", whole[:-1], bytes(flipped)):
            if damaged is None:
                (path / name).unlink()
            else:
                (path / name).write_bytes(damaged)
            for read in (checkpoint.load, checkpoint.facts):
                with pytest.raises(CheckpointError, match=f"x is truncated, damaged.*{name}"):
                    read(path)
            (path / name).write_bytes(whole)
    assert checkpoint.load(path)["step"] == 3


def test_any_byte_of_the_manifest_that_turns_is_seen_or_changes_nothing(tmp_path):
    path = tmp_path / "x"
    write(path)
    facts, manifest = checkpoint.facts(path), path / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        for bit in (1, 16):
            flipped = bytearray(whole)
            flipped[position] ^= bit
            manifest.write_bytes(bytes(flipped))
            try:
                assert checkpoint.facts(path, verify=False) == facts
            except CheckpointError as error:
                assert "x " in str(error)


def test_a_table_of_contents_that_would_run_code_is_refused(tmp_path):
    path, marker = tmp_path / "x", tmp_path / "ran"
    write(path)
    bad = pickle.dumps(Bad(marker))
    (path / ".metadata").write_bytes(bad)
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][".metadata"] = [len(bad), checkpoint._digest(path / ".metadata")]
    manifest["sha256"] = checkpoint._own_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="no business there"):
        checkpoint.load(path)
    assert not marker.exists()


def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path):
    write(tmp_path / "x")
    for name, tensor, said in (
        ("generator.net.weight", torch.zeros(3, 5), "does not fit this generator: net.weight has shape"),
        ("student.more", torch.zeros(1), "does not fit this student: it holds no more"),
    ):
        into = {"student.half": torch.zeros(4, dtype=torch.bfloat16), name: tensor}
        with pytest.raises(CheckpointError, match=said):
            checkpoint.restore(tmp_path / "x", into)
        assert not into["student.half"].any()


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_previous_folder(tmp_path, monkeypatch, background):
    path = tmp_path / "x"
    write(path, step=1)
    fill_the_disk(monkeypatch)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write(path, step=2, background=background)
    monkeypatch.undo()
    assert checkpoint.load(path)["step"] == 1 and os.listdir(tmp_path) == ["x"]


def test_a_second_checkpoint_of_the_same_name_replaces_the_first(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write(path, step=1)
    write(path, step=2)
    assert checkpoint.load(path)["step"] == 2 and os.listdir(tmp_path) == ["x"]

    # Killed between the two renames: what was there before is found.
    rename = os.rename

    def dies(source, target):
        if target == path:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        write(path, step=3)
    monkeypatch.undo()
    assert checkpoint.facts(path)["step"] == 2 and checkpoint.load(path)["step"] == 2


def test_only_the_last_few_are_kept(tmp_path):
    for step in (1, 20, 300):
        write(checkpoint.path_of(tmp_path, step), step, then=lambda step=step: checkpoint.keep_last(tmp_path, 2, step))
    (tmp_path / "step-notes").write_text("mine")
    (tmp_path / ".step-00000400.tmp").mkdir()
    checkpoint.clear_unfinished(tmp_path)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000020", "step-00000300"]
    assert sorted(os.listdir(tmp_path)) == ["step-00000020", "step-00000300", "step-notes"]

    # The last was damaged, and the run went on from the one before it: what it writes then is no older for that.
    write(checkpoint.path_of(tmp_path, 30), 30, then=lambda: checkpoint.keep_last(tmp_path, 1, 30))
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000030", "step-00000300"]
