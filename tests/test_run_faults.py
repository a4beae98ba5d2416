"""Faults around a run: its folder, its disk, readers beside it."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import types

import pytest
import torch

from emd_fast import config
from emd_fast.reporting import journal
from emd_fast.run import distill, watch
from emd_fast.run.folder import RunError
from emd_fast.run.writes import RunStopped
from emd_fast.tasks import gmm
from emd_fast.train import checkpoint, checkpoint_format, run_checkpoints
from emd_fast.train.checkpoint import CheckpointGone
from emd_fast.train.trainer import EMDTrainer

pytestmark = pytest.mark.usefixtures("without_pictures")

TINY = {
    "emd.steps": 8,
    "emd.batch_size": 16,
    "emd.langevin_steps": 2,
    "emd.fake_score_warmup": 2,
    "log_every": 2,
    "save_every": 3,
    "samples": 50,
    "mixture.generator_width": 8,
    "mixture.fake_score_width": 8,
}


def settings(**changes):
    return config.load("gmm", TINY | changes)


def at_step(monkeypatch, step, act):
    """Calls `act` as training reaches a step, once."""
    original = EMDTrainer.step

    def stepped(self, *arguments):
        result = original(self, *arguments)
        if self.steps_done == step:
            act()
        return result

    monkeypatch.setattr(EMDTrainer, "step", stepped)


def steps(folder):
    return [run_checkpoints.step_of(path) for path in run_checkpoints.found(folder / "checkpoints")]


@pytest.mark.parametrize("another", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_a_renamed_folder_is_saved_where_it_is_and_goes_on_there(tmp_path, monkeypatch, another, background):
    run, moved = tmp_path / "run", tmp_path / "moved"

    def rename():
        run.rename(moved)
        if another:
            shutil.copytree(moved, run, ignore=shutil.ignore_patterns(".*"))

    at_step(monkeypatch, 5, rename)
    chosen = settings(background_checkpoints=background)
    with pytest.raises(RunStopped, match=rf"was renamed to {moved} during .*at step 6, saved as {moved}") as error:
        distill.distill(chosen, run)
    assert ("another one has its name now" in str(error.value)) is another is run.exists()
    # In the background, that of step 3 may still have been under way.
    assert steps(moved)[-1] == 6 and steps(run) in ([], [3])
    monkeypatch.undo()
    distill.distill(chosen, moved)
    assert [row["step"] for row in journal.read(moved / "log.jsonl")] == [2, 4, 6, 8]


def test_a_removed_folder_is_not_made_again(tmp_path, monkeypatch):
    at_step(monkeypatch, 5, lambda: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(RunStopped, match="was removed during the run; training stopped at step 6, and its state is"):
        distill.distill(settings(background_checkpoints=False), tmp_path / "run")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["checkpoints", "samples", "log.jsonl", "config.toml"])
def test_what_is_removed_from_a_folder_ends_the_run_and_the_same_command_goes_on(tmp_path, monkeypatch, name):
    path = tmp_path / name
    at_step(monkeypatch, 4, lambda: shutil.rmtree(path) if path.is_dir() else path.unlink())
    with pytest.raises(RunStopped, match=rf"{path} was removed during the run; training stopped at step 4, saved as"):
        distill.distill(settings(background_checkpoints=False), tmp_path)
    assert steps(tmp_path)[-1] == 4
    monkeypatch.undo()
    distill.distill(settings(), tmp_path)
    assert [row["step"] for row in journal.read(tmp_path / "log.jsonl")] == [2, 4, 6, 8]


def test_a_folder_that_is_lost_while_the_run_is_evaluated(tmp_path, monkeypatch):
    evaluate = distill.evaluate

    def and_renamed(*arguments):
        metrics = evaluate(*arguments)
        (tmp_path / "run").rename(tmp_path / "moved")
        return metrics

    monkeypatch.setattr(distill, "evaluate", and_renamed)
    with pytest.raises(RunStopped, match="was renamed to"):
        distill.distill(settings(), tmp_path / "run")


@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_is_written_under_the_old_name_of_a_folder_that_is_moved_while_the_run_is_evaluated(
    tmp_path, monkeypatch, without_pictures, when
):
    evaluate = gmm.Mixture.evaluate

    def renamed(*arguments):
        if when == "before":  # it draws pictures
            (tmp_path / "run").rename(tmp_path / "moved")
        metrics = evaluate(*arguments)
        if when == "after":
            (tmp_path / "run").rename(tmp_path / "moved")
        return metrics

    without_pictures.undo()
    monkeypatch.setattr(gmm.Mixture, "evaluate", renamed)
    with pytest.raises(RunStopped, match=r"was renamed to .*moved during the run"):
        distill.distill(settings(), tmp_path / "run")
    assert os.listdir(tmp_path) == ["moved"]
    monkeypatch.undo()
    assert distill.distill(settings(), tmp_path / "moved")["steps"] == 8


def test_a_folder_that_cannot_be_written_any_more(tmp_path, monkeypatch):
    for name in ("checkpoints", "samples"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.toml").touch()
    watched = watch.FolderWatch(tmp_path)
    watched.check()
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "samples")
    with pytest.raises(RunError, match=r"samples cannot be written any more: its permissions were changed"):
        watched.check()
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((0,) * 8 + (os.ST_RDONLY, 0)))
    with pytest.raises(RunError, match=r"samples cannot be written any more: its file system is read-only now"):
        watched.check()
    watched.close()


def test_a_full_disk_at_the_log_says_whether_the_state_is_saved(tmp_path, monkeypatch):
    write = journal.Journal.write

    def full(self, row):
        if row["step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        write(self, row)

    monkeypatch.setattr(journal.Journal, "write", full)
    with pytest.raises(RunStopped, match=r"No space left on device: '.*log\.jsonl'; .* at step 4, saved as"):
        distill.distill(settings(), tmp_path / "a")

    def full_too(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    at_step(monkeypatch, 4, lambda: monkeypatch.setattr(checkpoint, "write_rows", full_too))
    with pytest.raises(RunStopped, match=r"log\.jsonl'; .* at step 4: cannot write the checkpoint .* is intact$"):
        # In the foreground: the checkpoint of step 3 is written before the disk is full.
        distill.distill(settings(background_checkpoints=False), tmp_path / "b")
    assert steps(tmp_path / "b") == [3]


def test_the_thread_of_tensorboard_prints_no_traceback_for_a_full_disk(tmp_path, monkeypatch):
    class Writer(threading.Thread):  # keeps its error for the next write, as that of TensorBoard does
        def __init__(self, error):
            super().__init__()
            self.error = error

        def run(self):
            raise self.error

    printed = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: printed.append(failed.exc_type))
    module = types.SimpleNamespace(SummaryWriter=lambda *_, **__: types.SimpleNamespace(close=lambda: None))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    before = threading.excepthook
    log = journal.Journal(tmp_path, 0, ("tensorboard",))
    for name, error in (("tensorboard.summary", OSError), ("tensorboard.summary", KeyError), ("other", OSError)):
        monkeypatch.setattr(Writer, "__module__", name)
        thread = Writer(error())
        thread.start()
        thread.join()
    log.close()
    assert printed == [KeyError, OSError] and threading.excepthook is before


# Readers beside a run in training -------------------------------------------------------------------------------------


def run_goes_on(monkeypatch, module, name, act, calls=1):
    """Calls `act` before each of the first `calls` calls of a function."""
    original, left = getattr(module, name), [act] * calls

    def called(*arguments, **options):
        if left:
            left.pop()()
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, called)


# Before the manifest, the digests and the tensors are read.
MOMENTS = [(checkpoint, "facts"), (checkpoint_format, "wrong_file"), (checkpoint_format, "read_rows")]


@pytest.mark.parametrize(("module", "name"), MOMENTS)
def test_a_reader_takes_the_next_checkpoint_if_its_own_is_removed(tmp_path, monkeypatch, capsys, module, name):
    distill.distill(settings(keep_checkpoints=1), tmp_path)
    checkpoints = tmp_path / "checkpoints"

    def save_the_next():
        (last,) = run_checkpoints.found(checkpoints)
        step = run_checkpoints.step_of(last) + 1
        state = checkpoint.load(last)
        # As `Writer` does it: the next one first, and then away with the old.
        checkpoint.save(run_checkpoints.path_of(checkpoints, step), {**state, "step": step})
        run_checkpoints.keep_last(checkpoints, 1, step)

    run_goes_on(monkeypatch, module, name, save_the_next, calls=2)
    *_, trainer = distill.open_run(tmp_path)
    assert 9 <= trainer.steps_done == run_checkpoints.step_of(run_checkpoints.found(checkpoints)[0])
    assert "skipped" not in capsys.readouterr().err


@pytest.mark.parametrize(("module", "name"), MOMENTS)
def test_a_best_checkpoint_that_is_replaced_while_it_is_read(tmp_path, monkeypatch, module, name):
    distill.distill(settings(**{"evaluation.every": 64}), tmp_path)
    best = run_checkpoints.best_of(tmp_path / "checkpoints")
    state = checkpoint.load(best)
    state["generator"] = {name: value + 1 for name, value in state["generator"].items()}
    run_goes_on(monkeypatch, module, name, lambda: checkpoint.save(best, {**state, "step": 99}))
    *_, trainer = distill.open_run(tmp_path, best=True)
    assert trainer.steps_done == 99
    assert all(torch.equal(value, state["generator"][name]) for name, value in trainer.generator.state_dict().items())


def test_a_damaged_checkpoint_is_still_reported(tmp_path, capsys):
    distill.distill(settings(), tmp_path)
    damaged = run_checkpoints.found(tmp_path / "checkpoints")[-1]
    (damaged / "rank-00000.bin").write_bytes(b"")
    *_, trainer = distill.open_run(tmp_path)
    assert trainer.steps_done == 6 and f"skipped: {damaged} is truncated" in capsys.readouterr().err


def test_a_checkpoint_that_is_always_removed_ends_the_reading(tmp_path, monkeypatch):
    distill.distill(settings(), tmp_path)

    def gone(*_):
        raise CheckpointGone("it was removed")

    monkeypatch.setattr(distill, "_resumed", gone)
    with pytest.raises(CheckpointGone, match="it was removed"):
        distill.open_run(tmp_path)
