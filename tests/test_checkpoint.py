from __future__ import annotations

import errno
import os
import pickle

import pytest
import torch

from emd_fast import checkpoint
from emd_fast.checkpoint import CheckpointError


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


def test_a_checkpoint_from_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_VERSION", 99)
    checkpoint.save(tmp_path / "x.pt", {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="version 99"):
        checkpoint.load(tmp_path / "x.pt")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Bad:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bad(), protocol=2))
    torch.save({"format": "emd_fast checkpoint", "version": 1, "bad": Bad()}, tmp_path / "zip.pt")
    for name in ("plain.pt", "zip.pt"):
        with pytest.raises(CheckpointError):
            checkpoint.load(tmp_path / name)
    assert not marker.exists()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"step": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.save(path, {"step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["x.pt"]


def test_only_the_last_few_are_kept(tmp_path):
    for step in (1, 20, 300):
        checkpoint.save(checkpoint.path_of(tmp_path, step), {"step": step})
    (tmp_path / "step-notes.pt").write_text("mine")
    checkpoint.keep_last(tmp_path, 2)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-00000020.pt", "step-00000300.pt"]
    assert (tmp_path / "step-notes.pt").exists()
