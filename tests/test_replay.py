"""One sample of a run again, alone: the same noise bit for bit, the same E-step to rounding."""

import dataclasses
import math

import pytest
import torch
from test_run import settings
from test_trainer import config, digits_teacher

from emd_fast import EMDTrainer
from emd_fast.cli import commands
from emd_fast.config import ConfigError
from emd_fast.em import score_difference
from emd_fast.run import distill
from emd_fast.run.folder import RunError
from emd_fast.run.replay import replay
from emd_fast.train import run_checkpoints
from emd_fast.train.health import Diverged

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six steps with checkpoints of steps 4 and 6."""
    path = tmp_path_factory.mktemp("runs") / "gmm"
    distill.distill(settings(), path)
    return path


def assert_sample(alone, batch, index):
    for name in ("z", "eps", "drift", "alpha", "sigma", "t"):
        torch.testing.assert_close(getattr(alone, name)[0], getattr(batch, name)[index], **TOLERANCE, msg=name)


CHANGES = [{}, {"guidance": 1.5}, {"sampling": "x_z"}, {"objective": "vsd"}, {"gamma_z": 0.0}, {"cuda_graph": True}]


@pytest.mark.parametrize("changes", CHANGES)
def test_a_sample_alone_is_that_sample_of_the_whole_batch(changes):
    trainer = EMDTrainer(digits_teacher(null_cond=0), config(num_classes=3, **changes))
    trainer.step()
    whole = trainer.sample_posterior(step=7)
    steps = []
    alone = trainer.sample_posterior(step=7, samples=range(5, 6), watch=steps.append)
    assert_sample(alone, whole, 5)
    assert torch.equal(alone.t[0], whole.t[5]) and torch.equal(alone.cond[0], whole.cond[5])
    if changes.get("gamma_z") == 0.0:  # z stays what was drawn
        assert torch.equal(alone.z[0], whole.z[5])
    assert [now.k for now in steps] == list(range(trainer.posterior.steps))
    torch.testing.assert_close(steps[-1].drift, alone.drift)
    torch.testing.assert_close(steps[-1].eps, alone.eps)


def test_what_is_seen_of_a_step_is_what_the_step_did():
    trainer = EMDTrainer(digits_teacher(), config(num_classes=3, langevin_steps=3))
    trainer.step()
    seen = []
    found = trainer.sample_posterior(
        step=2, samples=range(1, 3), watch=lambda now: seen.append((now.drift.clone(), now.delta, now.x0))
    )
    gamma, drift = trainer.config.gamma_eps, torch.zeros_like(found.eps)
    for shown, delta, _ in seen:
        drift = (1 - gamma) * drift + gamma * found.sigma.view(-1, 1, 1, 1) * delta
        torch.testing.assert_close(shown, drift, **TOLERANCE)
    assert drift.abs().max() > 0 and not torch.equal(seen[0][2], seen[1][2])


@pytest.mark.parametrize("sample", [0, 11, 15])
def test_a_replay_is_the_sample_of_the_batch_at_its_checkpoint(folder, sample):
    _, _, trainer = distill.open_run(folder, up_to=4)
    assert trainer.steps_done == 4
    whole = trainer.sample_posterior(step=4)
    again = replay(folder, 4, sample)
    assert_sample(again.found, whole, sample)
    assert len(again.rows) == 2
    for name in ("drift", "z", "eps"):
        rms = getattr(whole, name)[sample].square().mean().sqrt().item()
        assert again.rows[-1][name] == pytest.approx(rms, rel=1e-4), name
    torch.testing.assert_close(again.after[0], trainer.generator(whole.z, None)[sample], **TOLERANCE)
    assert "checkpoint of step 4, before the fake-score updates" in again.table()
    assert "1 steps earlier" in replay(folder, 5, sample).weights


@pytest.mark.parametrize("step", [4, 5])
def test_caught_up_it_is_what_the_run_computed(folder, monkeypatch, step):
    seen = {}
    original = EMDTrainer._e_step

    def noted(self, piece, watch=None):
        found = original(self, piece, watch)
        seen.setdefault(self.steps_done, found)
        return found

    monkeypatch.setattr(EMDTrainer, "_e_step", noted)
    _, _, trainer = distill.open_run(folder, up_to=4)
    trainer.step()
    trainer.step()
    monkeypatch.undo()
    assert_sample(replay(folder, step, 3, catch_up=True).found, seen[step], 3)
    with pytest.raises(AssertionError):  # without it, the fake score is that of before
        assert_sample(replay(folder, step, 3).found, seen[step], 3)


def test_what_cannot_be_replayed_is_one_clear_line(folder, tmp_path, refused):
    for where, step, sample, error, said in (
        (folder, 3, 0, RunError, "no checkpoint at or before step 3: it has those of step 4, 6"),
        (folder, 4, 16, ConfigError, r"sample must be in \[0, 16\) in .*, got 16"),
        (folder, 4, -1, ConfigError, r"sample must be in \[0, 16\) in .*, got -1"),
        (folder, -1, 0, ConfigError, "step must be in"),
        (tmp_path, 4, 0, RunError, "not the folder of a run"),
    ):
        with pytest.raises(error, match=said):
            replay(where, step, sample)
    refused(2, "no checkpoint", "replay", folder, "--step", 3, "--sample", 0)
    refused(2, "sample must be", "replay", folder, "--step", 4, "--sample", 99)


@pytest.mark.usefixtures("without_pictures")
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, capsys):
    distill.distill(settings(), tmp_path)
    file = run_checkpoints.path_of(tmp_path / "checkpoints", 6) / "rank-00000.bin"
    file.write_bytes(file.read_bytes()[:100])
    assert "checkpoint of step 4, 2 steps earlier" in replay(tmp_path, 6, 0).weights
    assert "step-00000006 is truncated" in capsys.readouterr().err


def test_the_command_prints_the_steps_and_writes_the_pictures(folder, tmp_path, capsys):
    assert commands.main(["replay", str(folder), "--step", "6", "--sample", "2", "--out", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out
    for word in ("drift", "delta", "alpha", "sigma", "condition none", "checkpoint of step 6"):
        assert word in said, word
    assert (tmp_path / "x" / "points.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "x" / "replay.txt").read_text() in said


@pytest.mark.parametrize(
    ("channels", "after", "pictures"),
    [(1, 0.5, ["before.png", "after.png"]), (3, math.nan, ["before.png"]), (4, 0.5, [])],
)
def test_images_are_pictures_where_they_can_be_and_tensors_always(folder, tmp_path, channels, after, pictures):
    images = torch.zeros(1, channels, 8, 8)
    found = dataclasses.replace(replay(folder, 4, 0), before=images, after=images + after)
    assert [path.name for path in found.write(tmp_path)] == ["replay.txt", "samples.pt", *pictures]
    assert torch.equal(torch.load(tmp_path / "samples.pt")["before"], images)
    if len(pictures) == 2:
        assert (tmp_path / "before.png").read_bytes() != (tmp_path / "after.png").read_bytes()


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_stopped_names_the_command(tmp_path, monkeypatch, capsys):
    distill.distill(settings(emd__steps=4), tmp_path)
    outputs = score_difference.ScoreDifference.outputs
    nan = lambda self, x: [F * math.nan for F in outputs(self, x)]  # noqa: E731
    monkeypatch.setattr(score_difference.ScoreDifference, "outputs", nan)
    with pytest.raises(Diverged):
        distill.distill(settings(emd__steps=8, emd__max_skipped=1), tmp_path)
    command = f"emd-fast replay {tmp_path} --step 5 --sample 0"
    assert command in (tmp_path / "report.md").read_text() and command in capsys.readouterr().err
    assert commands.main(command.split()[1:]) == 0
    assert "nan" in capsys.readouterr().out
