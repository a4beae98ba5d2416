import errno
import os
import threading

import pytest
import torch
from watch import resigned

from emd_fast.train import checkpoint, run_checkpoints
from emd_fast.train.checkpoint import CheckpointError

TENSORS = {
    "generator.net.weight": torch.arange(12.0).reshape(3, 4),
    "generator.net.count": torch.tensor(7),
    "fake_score.empty": torch.zeros(0, 3),
    "fake_score.half": torch.arange(4).to(torch.bfloat16),
    "generator_optimizer.net.weight.step": torch.tensor(3.0),
}


def write(path, step=3, tensors=None, **options):
    writer = checkpoint.Writer()
    writer.save(path, {**TENSORS, **(tensors or {})}, {"step": step, "config": {"lr": 0.5, "none": {}}}, **options)
    writer.wait()


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpoint.load(path)
    torch.save({"model": torch.randn(3)}, path)
    with pytest.raises(CheckpointError, match="x is a file, no folder"):
        checkpoint.load(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"x is .*no checkpoint of emd_fast .*No such file.*make it again"):
        checkpoint.load(path, remedy="make it again")
    (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not that of a checkpoint"):
        checkpoint.load(path)


@pytest.mark.parametrize(("version", "age"), [(2, "an earlier"), (99, "a later")])
def test_a_checkpoint_of_another_release_is_refused(tmp_path, version, age):
    write(tmp_path / "x")
    resigned(tmp_path / "x", lambda table: table.update(version=version, files={".metadata": [1, "0"]}))
    for read in (checkpoint.load, checkpoint.facts, checkpoint.shapes):
        with pytest.raises(CheckpointError, match=f"x has format version {version}, of {age} release"):
            read(tmp_path / "x")


@pytest.mark.parametrize("tensors", [{"": torch.ones(1)}, {"step.x": torch.ones(1)}, {"w": torch.ones(1)}])
def test_what_could_not_be_read_is_not_written(tmp_path, tensors):
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*is wrong in the name"):
        write(tmp_path / "x", tensors=tensors)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("background", [False, True])
def test_a_folder_gives_back_what_went_in(tmp_path, background):
    path = tmp_path / "runs" / "step-00000003"
    write(path, background=background)
    state = checkpoint.load(path)
    assert state["step"] == 3 and state["config"] == {"lr": 0.5, "none": {}}
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
    assert names == ["manifest.json", "rank-00000.bin"]
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


@pytest.mark.slow
def test_any_bit_that_turns_in_the_manifest_is_seen(tmp_path):
    path = tmp_path / "x"
    write(path)
    manifest = path / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            manifest.write_bytes(bytes(flipped))
            with pytest.raises(CheckpointError, match=r"x (is truncated, damaged|has format version)"):
                checkpoint.facts(path, verify=False)


@pytest.mark.parametrize(
    ("name", "tensor", "said"),
    [
        ("generator.net.weight", torch.zeros(3, 5), "does not fit this generator: net.weight has shape"),
        ("generator.net.weight", torch.zeros(3, 4).double(), "does not fit this generator: net.weight has dtype"),
        ("fake_score.more", torch.zeros(1), "does not fit this fake_score: it holds no more"),
        ("fake_score.empty", None, "it holds empty of fake_score, for which there is no tensor here"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(tmp_path, name, tensor, said):
    write(tmp_path / "x")
    into = {key: torch.zeros_like(value) for key, value in TENSORS.items()} | {name: tensor}
    if tensor is None:
        del into[name]
    with pytest.raises(CheckpointError, match=said):
        checkpoint.restore(tmp_path / "x", into)
    assert not any(value.any() for value in into.values())


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_previous_folder(tmp_path, monkeypatch, background):
    path = tmp_path / "x"
    write(path, step=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
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
        write(
            run_checkpoints.path_of(tmp_path, step),
            step,
            then=lambda step=step: run_checkpoints.keep_last(tmp_path, 2, step),
        )
    (tmp_path / "step-notes").write_text("mine")
    (tmp_path / ".step-00000400.tmp").mkdir()
    run_checkpoints.clear_unfinished(tmp_path)
    assert [path.name for path in run_checkpoints.found(tmp_path)] == ["step-00000020", "step-00000300"]
    assert sorted(os.listdir(tmp_path)) == ["step-00000020", "step-00000300", "step-notes"]
    # The last was damaged, and the run went on from the one before it: what it writes then is no older for that.
    write(run_checkpoints.path_of(tmp_path, 30), 30, then=lambda: run_checkpoints.keep_last(tmp_path, 1, 30))
    assert [path.name for path in run_checkpoints.found(tmp_path)] == ["step-00000030", "step-00000300"]
