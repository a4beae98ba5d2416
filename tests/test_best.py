"""Periodic evaluation during training, and the best checkpoint."""

import json
import math

import pytest
import torch
from test_run import assert_same, settings, weights

from emd_fast import config
from emd_fast.reporting import journal
from emd_fast.run import distill
from emd_fast.run import loop as training
from emd_fast.tasks.digits import Digits
from emd_fast.tasks.gmm import Mixture
from emd_fast.train import checkpoint, run_checkpoints

pytestmark = pytest.mark.usefixtures("without_pictures")

EVERY = {"evaluation__every": 32}  # images: two steps of 16


def distances(folder):
    rows = journal.read(folder / "log.jsonl")
    return {row["step"]: row["evaluation_frechet"] for row in rows if "evaluation_frechet" in row}


def best(folder):
    facts = checkpoint.facts(run_checkpoints.best_of(folder / "checkpoints"))
    return facts["step"], facts["notes"]["figures"]["frechet"]


@pytest.fixture
def figures(monkeypatch):
    """The Fréchet distance of each evaluation."""
    values = []
    monkeypatch.setattr(Mixture, "interim_metrics", lambda self, trainer: {"frechet": values.pop(0)})
    return values


@pytest.fixture
def judged(figures, tmp_path):
    """judged(distances, **settings): a run, or more of it, whose evaluations have these distances."""

    def run(distances, **changes):
        figures[:] = distances
        distill.distill(settings(**EVERY | changes), tmp_path)

    return run


def test_evaluation_leaves_the_training_bit_for_bit_and_keeps_the_best(tmp_path):
    metrics = distill.distill(settings(**EVERY, keep_checkpoints=1), tmp_path / "evaluated")
    distill.distill(settings(), tmp_path / "plain")
    assert_same(weights(tmp_path / "evaluated"), weights(tmp_path / "plain"))
    rows = distances(tmp_path / "evaluated")
    assert list(rows) == [2, 4, 6] and len(set(rows.values())) == 3
    step, value = best(tmp_path / "evaluated")
    assert value == min(rows.values()) == rows[step]
    assert metrics["best"]["step"] == step and metrics["best"]["frechet"] == value
    assert f"that of step {step}," in (tmp_path / "evaluated" / "report.md").read_text()
    # The generator of the last step is the same in both, and so is its distance.
    assert rows[6] == metrics["frechet"]["generator"]
    row = next(row for row in journal.read(tmp_path / "evaluated" / "log.jsonl") if "evaluation_frechet" in row)
    assert {"step", "seconds", "evaluation_recall", "evaluation_modes", "evaluation_seconds"} <= set(row)


def test_nothing_is_evaluated_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "Best", lambda *_: pytest.fail("evaluated"))
    metrics = distill.distill(settings(), tmp_path)
    assert not distances(tmp_path) and "best" not in metrics
    assert not run_checkpoints.best_of(tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (40, [3, 5, 6]), (1000, [6])])
def test_every_so_many_images_and_at_the_end(tmp_path, every, steps, judged):
    judged([1.0] * 6, evaluation__every=every)
    assert list(distances(tmp_path)) == steps


def test_the_best_is_replaced_by_a_better_one_alone_and_survives_a_resume(tmp_path, judged):
    judged([3.0, 1.0, 2.0], keep_checkpoints=1)
    assert best(tmp_path) == (4, 1.0)
    state = checkpoint.load(run_checkpoints.best_of(tmp_path / "checkpoints"))["generator"]
    assert [path.name for path in run_checkpoints.found(tmp_path / "checkpoints")] == ["step-00000006"]
    judged([1.5, 1.0], emd__steps=10)
    assert best(tmp_path) == (4, 1.0)
    assert_same(checkpoint.load(run_checkpoints.best_of(tmp_path / "checkpoints"))["generator"], state)
    judged([math.nan, 0.5], emd__steps=14)
    assert best(tmp_path) == (14, 0.5)
    assert distances(tmp_path).keys() == {2, 4, 6, 8, 10, 12, 14}


def test_a_damaged_best_is_said_and_the_next_evaluation_replaces_it(tmp_path, capsys, judged):
    judged([1.0, 2.0, 3.0])
    path = run_checkpoints.best_of(tmp_path / "checkpoints")
    (path / "rank-00000.bin").write_bytes(b"gone")
    with pytest.raises(checkpoint.CheckpointError, match="best is truncated, damaged"):
        distill.open_run(tmp_path, best=True)
    judged([5.0], emd__steps=8)
    assert "the best checkpoint is left out" in capsys.readouterr().err
    assert best(tmp_path) == (8, 5.0)


def test_a_generator_that_cannot_be_evaluated_stops_no_run(tmp_path, figures, monkeypatch, capsys):
    figures += [2.0, 1.0]
    interim_metrics = Mixture.interim_metrics

    def fails_once(self, trainer):
        if trainer.steps_done == 4:
            raise ValueError("samples must be finite: they hold NaN or infinite values")
        return interim_metrics(self, trainer)

    monkeypatch.setattr(Mixture, "interim_metrics", fails_once)
    distill.distill(settings(**EVERY), tmp_path)
    assert "the generator of step 4 cannot be evaluated: samples must be finite" in capsys.readouterr().err
    rows = distances(tmp_path)
    assert rows.keys() == {2, 4, 6} and math.isnan(rows[4]) and best(tmp_path) == (6, 1.0)


def test_figures_of_other_samples_are_not_compared(tmp_path, capsys, judged):
    judged([1.0, 2.0, 3.0])
    judged([7.0], emd__steps=8, samples=60)
    assert "was evaluated with other files or samples" in capsys.readouterr().err
    assert best(tmp_path) == (8, 7.0)


def test_what_a_crash_left_behind_is_cleared(tmp_path, judged):
    judged([1.0] * 3)
    checkpoints = tmp_path / "checkpoints"
    # In the middle of replacing it, and in the middle of writing another.
    run_checkpoints.best_of(checkpoints).rename(checkpoints / ".best.old")
    (checkpoints / ".best.tmp").mkdir()
    assert distill.open_run(tmp_path, best=True)[2].steps_done == 2
    judged([0.5], emd__steps=8)
    assert best(tmp_path) == (8, 0.5)
    assert not list(checkpoints.glob(".best*"))


def test_the_command_line_chooses_the_best(tmp_path, figures, call, refused, capsys):
    figures += [3.0, 1.0, 2.0]
    folder = tmp_path / "run"
    distill.distill(settings(**EVERY), folder)
    for name, options in {"best": ["--best"], "last": []}.items():
        assert call("sample", folder, "-n", 5, "--out", tmp_path / f"{name}.pt", *options)[0] == 0
        assert call("export", folder, tmp_path / f"{name}.safetensors", *options)[0] == 0
        out = tmp_path / f"{name}-exported.pt"
        assert call("sample", tmp_path / f"{name}.safetensors", "-n", 5, "--out", out)[0] == 0
        assert torch.equal(torch.load(out), torch.load(tmp_path / f"{name}.pt"))
    assert not torch.equal(torch.load(tmp_path / "best.pt"), torch.load(tmp_path / "last.pt"))
    last = json.loads((folder / "metrics.json").read_text())
    code, said, _ = call("evaluate", folder, "--best")
    metrics = json.loads(said)
    assert code == 0 and metrics["steps"] == 4 and metrics["trained"] == 6
    assert "These metrics are of the checkpoint of step 4." in (folder / "report.md").read_text()
    assert metrics["frechet"]["generator"] != last["frechet"]["generator"]
    distill.distill(settings(**EVERY), folder)  # finished, though an earlier checkpoint was evaluated last
    assert "is finished" in capsys.readouterr().err
    refused(2, "--best needs a run folder", "sample", tmp_path / "best.safetensors", "--best", "--out", "x.pt")
    distill.distill(settings(), tmp_path / "plain")
    capsys.readouterr()
    said = "has no best checkpoint: distil with --evaluation.every IMAGES"
    refused(2, said, "sample", tmp_path / "plain", "--best", "--out", "x.pt")


@pytest.mark.slow
def test_digits_have_the_metrics_of_the_end(tmp_path):
    tiny = {"teacher.steps": 2, "teacher.channels": 4, "evaluation.every": 8}
    tiny |= {"emd.steps": 1, "emd.batch_size": 8, "emd.langevin_steps": 1}
    metrics = distill.distill(config.load("digits", tiny), tmp_path)
    (row,) = (row for row in journal.read(tmp_path / "log.jsonl") if "evaluation_frechet" in row)
    for name in ("frechet", "recall", "precision", "accuracy"):
        assert row[f"evaluation_{name}"] == metrics[name]["generator"], name
    assert Digits(config.load("digits", tiny)).basis() == {}


def on_a_rank(folder, parallel):
    return distill.distill(settings(**EVERY, emd__parallelism__parallel=parallel), folder)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["replicate", "fsdp"])
def test_ranks_agree_on_the_best(ranks, tmp_path, parallel):
    first, second = ranks(2, on_a_rank, tmp_path, parallel)
    rows = distances(tmp_path)
    step, value = best(tmp_path)
    assert list(rows) == [2, 4, 6] and value == min(rows.values()) == rows[step]
    assert first["best"] == second["best"] and first["best"]["step"] == step
    distill.distill(settings(**EVERY, emd__steps=8, emd__parallelism__parallel=parallel), tmp_path)  # on one process
    assert best(tmp_path)[1] == min(distances(tmp_path).values())
