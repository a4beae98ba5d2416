"""A run in its folder, in this process; the command line as a process is in test_cli.py."""

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import math
import os
import signal
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from emd_fast import config
from emd_fast.config import ConfigError
from emd_fast.em import score_difference
from emd_fast.io.files import write_atomic
from emd_fast.reporting import journal, report
from emd_fast.run import distill, study
from emd_fast.run.folder import RunError, locked, metrics_of, open_folder
from emd_fast.run.passes import passes
from emd_fast.run.signals import Interrupted
from emd_fast.run.variants import Comparison, Variant, comparison
from emd_fast.train import checkpoint, run_checkpoints
from emd_fast.train.checkpoint import CheckpointError
from emd_fast.train.health import Diverged

pytestmark = pytest.mark.usefixtures("without_pictures")

TINY = {"emd.steps": 6, "emd.batch_size": 16, "emd.langevin_steps": 2, "emd.fake_score_warmup": 2, "samples": 50}
TINY |= {"log_every": 2, "save_every": 2, "mixture.generator_width": 8, "mixture.fake_score_width": 8}


def settings(**changes):
    return config.load("gmm", {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}})


def weights(folder, step=6):
    return checkpoint.load(run_checkpoints.path_of(folder / "checkpoints", step))["generator"]


def assert_same(first, second):
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_a_run_leaves_the_promised_folder(tmp_path, without_pictures):
    without_pictures.undo()
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    metrics = distill.distill(settings(), tmp_path)
    assert [signal.getsignal(number) for number in numbers] == before
    for name in ("config.toml", "log.jsonl", "metrics.json", "report.md", "samples/points.png"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert config.load(str(tmp_path / "config.toml")) == settings()
    assert [row["step"] for row in journal.read(tmp_path / "log.jsonl")] == [2, 4, 6]
    assert metrics_of(tmp_path) == metrics
    assert set(json.loads((tmp_path / "metrics.json").read_text())) == {*metrics, "sha256"}
    assert set(metrics["frechet"]) == {"real", "teacher", "init", "generator"}
    assert set(metrics["seconds"]) == {"teacher", "distil", "evaluate"}
    names = [path.name for path in run_checkpoints.found(tmp_path / "checkpoints")]
    assert names == ["step-00000004", "step-00000006"]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_what_is_not_installed_is_said_before_anything_is_made(tmp_path, monkeypatch):
    for module, changes, sinks, said in (
        ("torch.utils.tensorboard", {}, ("tensorboard",), "TensorBoard is not installed"),
        ("wandb", {}, ("wandb",), r"emd_fast\[log\]"),
        ("torchao.optim", {"emd__optimizer__name": "adamw_8bit"}, (), "needs torchao"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises((ModuleNotFoundError, ConfigError), match=said):
            distill.distill(settings(**changes), tmp_path / "run", sinks)
        assert not (tmp_path / "run").exists()


def test_a_finished_run_says_so_and_trains_nothing(tmp_path, capsys, monkeypatch):
    metrics = distill.distill(settings(), tmp_path)
    monkeypatch.setattr(distill.EMDTrainer, "step", lambda self: pytest.fail("a finished run trained on"))
    assert distill.distill(settings(), tmp_path) == metrics
    assert "is finished: 6 steps" in capsys.readouterr().err


def test_more_steps_go_on_from_a_finished_run(tmp_path, capsys):
    distill.distill(settings(emd__steps=2), tmp_path / "legs")
    distill.distill(settings(), tmp_path / "legs")
    assert "resuming" in capsys.readouterr().err
    distill.distill(settings(), tmp_path / "whole")
    assert_same(weights(tmp_path / "legs"), weights(tmp_path / "whole"))
    legs, whole = (journal.read(tmp_path / name / "log.jsonl") for name in ("legs", "whole"))
    assert [row["drift_rms"] for row in legs] == [row["drift_rms"] for row in whole]


def stopped(code, settings, folder):
    with pytest.raises(Interrupted) as stop:
        distill.distill(settings, folder)
    assert stop.value.exit_code == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops_and_the_run_goes_on_bit_for_bit(tmp_path, monkeypatch, number):
    step = distill.EMDTrainer.step

    def interrupted(self, cond=None):
        if self.steps_done == 2:
            os.kill(os.getpid(), number)
        return step(self, cond)

    monkeypatch.setattr(distill.EMDTrainer, "step", interrupted)
    if number == signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)  # under nohup it is ignored, and a run leaves it so
    stopped(128 + number, settings(save_every=100), tmp_path / "legs")
    assert not (tmp_path / "legs" / "metrics.json").exists()
    monkeypatch.undo()
    for folder in ("legs", "whole"):
        distill.distill(settings(save_every=100), tmp_path / folder)
    assert_same(weights(tmp_path / "legs"), weights(tmp_path / "whole"))


@pytest.mark.parametrize(("place", "number"), [("_found", signal.SIGTERM), ("evaluate", signal.SIGINT)])
def test_a_signal_outside_of_the_training_ends_the_run_at_once(tmp_path, monkeypatch, capsys, place, number):
    def interrupted(*_):
        try:
            os.kill(os.getpid(), number)
            pytest.fail("it went on")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # again, on the way out

    monkeypatch.setattr(distill, place, interrupted)
    stopped(128 + number, settings(emd__steps=2), tmp_path)
    assert capsys.readouterr().err.count("stopped; the same command goes on from what is saved") == 1


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(tmp_path, monkeypatch, capsys):
    original, main = checkpoint._write_folder, threading.main_thread()

    def slowly(path, *arguments):
        if path.name == "step-00000002":
            assert threading.current_thread() is not main
            os.kill(os.getpid(), signal.SIGTERM)
        original(path, *arguments)

    monkeypatch.setattr(checkpoint, "_write_folder", slowly)
    stopped(143, settings(emd__steps=2, background_checkpoints=True), tmp_path)
    assert "stopped at step 2 of 2, saved" in capsys.readouterr().err
    assert weights(tmp_path, 2)


def test_a_closed_terminal_does_not_end_a_run_under_nohup(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    step = distill.EMDTrainer.step
    monkeypatch.setattr(distill.EMDTrainer, "step", lambda self: (os.kill(os.getpid(), signal.SIGHUP), step(self))[1])
    try:
        assert distill.distill(settings(emd__steps=2), tmp_path)["steps"] == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_works_outside_of_the_main_thread(tmp_path):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(distill.distill, settings(emd__steps=2), tmp_path).result()["steps"] == 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, capsys):
    distill.distill(settings(), tmp_path / "damaged")
    distill.distill(settings(emd__steps=8), tmp_path / "whole")
    last = run_checkpoints.path_of(tmp_path / "damaged" / "checkpoints", 6) / "rank-00000.bin"
    last.write_bytes(last.read_bytes()[:500])
    distill.distill(settings(emd__steps=8), tmp_path / "damaged")
    said = capsys.readouterr().err
    assert "step-00000006 is truncated, damaged" in said and "at step 4 of 8" in said
    assert_same(weights(tmp_path / "damaged", 8), weights(tmp_path / "whole", 8))


def test_when_no_checkpoint_can_be_read_nothing_is_overwritten(tmp_path):
    distill.distill(settings(emd__steps=2), tmp_path)
    path = run_checkpoints.path_of(tmp_path / "checkpoints", 2) / "rank-00000.bin"
    path.write_bytes(b"gone")
    with pytest.raises(CheckpointError, match="delete them to start over"):
        distill.distill(settings(), tmp_path)
    assert path.read_bytes() == b"gone"


def test_the_last_step_of_a_schedule_stays_where_it_is(tmp_path):
    ends = {"emd__optimizer__lr_schedule": "linear"}
    for steps in (2, 3):  # nothing has begun
        with contextlib.ExitStack() as held:
            open_folder(tmp_path, settings(emd__steps=steps, **ends), held)
    (tmp_path / "log.jsonl").touch()
    with contextlib.ExitStack() as held, pytest.raises(RunError, match=r"emd\.steps = 3, not 4"):
        open_folder(tmp_path, settings(emd__steps=4, **ends), held)
    assert config.load(str(tmp_path / "config.toml")) == settings(emd__steps=3, **ends)


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_under_way(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "evaluate", lambda *_: {})
    (tmp_path / ".lock").write_text("process 1 on a machine that is off")  # of a run that was killed
    with locked(tmp_path), pytest.raises(RunError, match=rf"under way in .* \(process {os.getpid()} on "):
        distill.distill(settings(emd__steps=2), tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    distill.distill(settings(emd__steps=2), tmp_path)
    with locked(tmp_path):  # it is free again
        pass


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(distill, "evaluate", lambda *_: {})
    distill.distill(settings(emd__steps=2), tmp_path)
    assert f"{tmp_path} cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_disk_that_is_full_at_the_end_leaves_the_run_unfinished(tmp_path, monkeypatch):
    def full(folder):
        def write(_):
            raise OSError(errno.ENOSPC, "No space left on device")

        write_atomic(folder / "report.md", write)

    monkeypatch.setattr(report, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: .*report\.md"):
        distill.distill(settings(emd__steps=2), tmp_path)
    assert (tmp_path / "metrics.json").exists()
    monkeypatch.undo()
    distill.distill(settings(emd__steps=2), tmp_path)
    assert "## Results" in (tmp_path / "report.md").read_text()


def test_a_run_that_diverges_ends_with_a_report(tmp_path, monkeypatch):
    at = score_difference.ScoreDifference.outputs
    nan = lambda self, x: [F * math.nan for F in at(self, x)]  # noqa: E731
    monkeypatch.setattr(score_difference.ScoreDifference, "outputs", nan)
    with pytest.raises(Diverged, match="z"):
        distill.distill(settings(), tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "stopped" in report and "gamma_z" in report
    assert not (tmp_path / "metrics.json").exists()
    state = run_checkpoints.found(tmp_path / "checkpoints")
    assert all(torch.isfinite(v).all() for path in state for v in checkpoint.load(path)["generator"].values())


def logged(folder, step, row):
    log = journal.Journal(folder, step)
    log.write(row)
    log.close()


def test_rows_after_the_checkpoint_are_taken_out_of_the_log(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2, "x": 1}\n{"step": 4, "x": 1}\n{"step": 6, "x"')
    logged(tmp_path, 3, {"step": 5, "x": 2})
    assert [row["step"] for row in journal.read(path)] == [2, 5]


def test_a_full_disk_ends_the_log_and_the_next_leg_takes_half_a_row_out(tmp_path):
    path, left = tmp_path / "log.jsonl", [57]
    log = journal.Journal(tmp_path, 0)
    file = log._file

    def write(row):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = file.write(row[: left[0]])
        left[0] -= done
        return done

    log._file = types.SimpleNamespace(write=write, close=file.close)
    log.write({"step": 1, "x": 1})
    with pytest.raises(OSError, match=r"No space left on device: .*log\.jsonl"):
        log.write({"step": 2, "x": 2})
    log.close()
    assert path.stat().st_size == 57 and [row["step"] for row in journal.read(path)] == [1]
    logged(tmp_path, 1, {"step": 2, "x": 2})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_the_legs_of_a_run_are_one_to_tensorboard_and_weights_and_biases(tmp_path, monkeypatch):
    begun = []

    def init(**options):
        begun.append(options)
        return types.SimpleNamespace(id=options["id"] or "made", log=lambda *_, **__: None, finish=lambda: None)

    def writer(folder, **options):
        begun.append({"folder": folder, **options})
        return types.SimpleNamespace(add_scalar=lambda *_: None, close=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    for step in (0, 4):
        journal.Journal(tmp_path, step, ("wandb", "tensorboard"), {"steps": step}).close()
    first, board, second, resumed_board = begun
    assert (first["id"], second["id"]) == (None, "made") and {first["resume"], second["resume"]} == {"allow"}
    # What was logged beyond the step where the run goes on is taken back.
    assert (board["purge_step"], resumed_board["purge_step"]) == (1, 5) and board["folder"] == resumed_board["folder"]

    def refused(**_):
        raise Exception("no key")  # wandb has errors of its own

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refused))
    with pytest.raises(RuntimeError, match="Weights & Biases cannot be used: no key"):
        journal.Journal(tmp_path, 4, ("wandb",))


def test_a_study_spends_the_same_on_every_variant():
    for recipe, vary in (("gmm", "langevin_steps"), ("digits", "calls"), ("digits-4", "calls")):
        configs = [variant.settings.emd for variant in comparison(config.load(recipe), vary).variants]
        spent = [each.steps * passes(each) for each in configs]
        assert max(spent) / min(spent) < 1.02
        assert {each.objective for each in configs} == ({"vsd", "emd"} if recipe == "gmm" else {"emd"})
        if vary == "calls":
            assert [(each.calls, each.langevin_steps) for each in configs] == list(itertools.product((1, 2, 4), (1, 4)))


def test_a_study_counts_the_passes_of_the_rollouts():
    emd = dataclasses.replace(config.load("digits").emd, fake_score_updates=2)
    assert passes(dataclasses.replace(emd, rungs=4)) - passes(emd) == (2 + 1) * (4 - 1) / 2


def test_a_study_of_adapters_varies_the_rank_and_its_learning_rates(tmp_path):
    for network, rate in (("unet", 1), ("dit", 3)):
        found = config.load("digits", {"emd.steps": 7, "teacher.network": network})
        whole, *adapted = comparison(found, "adapters").variants
        assert whole.settings == found
        assert [variant.settings.emd.adapter.rank for variant in adapted] == [8, 32]
        for variant in adapted:
            optimizer = variant.settings.emd.optimizer
            assert (optimizer.generator_lr, optimizer.fake_score_lr) == pytest.approx((rate * 1e-3, rate * 2e-3))
            assert variant.settings.emd.steps == 7
    for recipe, changes in (("gmm", {}), ("digits", {"emd.adapter.rank": 4})):
        with pytest.raises(ConfigError, match="study of adapters"):
            study.conduct(config.load(recipe, changes), tmp_path / "study", "adapters")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_study_writes_its_table(tmp_path, monkeypatch):
    def compared(found, vary):
        assert vary == "langevin_steps"
        return Comparison("T", "Q", [Variant("A", found), Variant("B", found)], 2, {"C": ("B", "init")})

    monkeypatch.setattr(study, "comparison", compared)
    path = study.conduct(settings(emd__steps=2), tmp_path)
    lines = path.read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[-3:]] == ["| A", "| B", "| C"] and "±" in lines[-2]
    assert lines[-1].endswith("| - | - | - |"), "a set that no run trains has no steps"
    rows = json.loads((tmp_path / "study.json").read_text())
    assert len(rows["A"]) == 2 and len({row["frechet"] for row in rows["A"]}) == 2
    metrics = [metrics_of(tmp_path / f"B-seed{seed}") for seed in (0, 1)]
    assert [row["frechet"] for row in rows["C"]] == [each["frechet"]["init"] for each in metrics]
