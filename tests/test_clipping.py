"""Gradient clipping, and the share of updates whose gradient was clipped."""

import dataclasses
import math

import pytest
import torch
from helpers import HostReads
from test_trainer import config, points_teacher
from watch import at, resigned

from emd_fast import EMDTrainer
from emd_fast.train.clipping import Clipping

NAMES = ("generator", "fake_score")


def shares(metrics) -> dict[str, float]:
    return {name: metrics[f"{name}_clipped"].item() for name in NAMES}


def test_gradients_above_the_limit_are_clipped_and_counted():
    clipping = Clipping(2.0, torch.device("cpu"))
    assert clipping.share().item() == 0
    for value, share in ((1.0, 0.0), (3.0, 1 / 2), (2.0, 1 / 3), (50.0, 2 / 4), (math.inf, 2 / 5), (math.nan, 2 / 6)):
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.grad = torch.tensor([value])
        clipping.clip([parameter], parameter.grad.norm())
        assert clipping.share().item() == pytest.approx(share)
        if math.isfinite(value):
            assert parameter.grad.item() == pytest.approx(min(value, 2.0), rel=1e-5)
    assert clipping.counts() == [2, 6]


def test_without_a_limit_nothing_is_clipped():
    clipping = Clipping(0.0, torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.tensor([1e9])
    clipping.clip([parameter], parameter.grad.norm())
    assert parameter.grad.item() == 1e9 and clipping.counts() == [0, 1] and clipping.share().item() == 0


def test_a_step_reports_the_shares_of_both_networks():
    trainer = EMDTrainer(points_teacher(), config(grad_clip=0.1, fake_score_updates=3, fake_score_warmup=2))
    metrics = trainer.step()
    assert metrics["generator_grad_norm"] < 0.1 < metrics["fake_score_grad_norm"]  # before clipping
    assert shares(metrics) == {"generator": 0.0, "fake_score": 1.0}
    assert trainer.learners["fake_score"].clipping.counts() == [5, 5]  # with the warm-up


def test_a_resumed_run_goes_on_with_the_shares(tmp_path):
    teacher, settings = points_teacher(), config(grad_clip=0.9, steps=6)
    whole, half = EMDTrainer(teacher, settings), EMDTrainer(teacher, settings)
    for trainer in (whole, half):
        for _ in range(2):
            trainer.step()
    half.save(tmp_path / "x")
    resumed = EMDTrainer.resume(tmp_path / "x", teacher)
    clipped, updates = resumed.learners["fake_score"].clipping.counts()
    assert 0 < clipped < updates == 4
    for _ in range(3):
        expected, found = whole.step(), resumed.step()
        assert all(torch.equal(expected[key], found[key]) for key in expected), (expected, found)


def test_a_checkpoint_without_these_numbers_counts_from_there(tmp_path):
    teacher = points_teacher()
    trainer = EMDTrainer(teacher, config(grad_clip=1e-9))
    trainer.step()
    trainer.save(tmp_path / "x")
    resigned(tmp_path / "x", at("facts", "clipped"))
    resumed = EMDTrainer.resume(tmp_path / "x", teacher, config=dataclasses.replace(trainer.config, steps=9))
    assert resumed.learners["generator"].clipping.counts() == [0, 0]
    assert shares(resumed.step()) == {"generator": 1.0, "fake_score": 1.0}


def test_clipping_reads_nothing_from_the_device():
    found: list[str] = []
    clipping = Clipping(1.0, torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    with HostReads(found.append):
        clipping.clip([parameter], parameter.grad.norm())
        clipping.share()
    assert not found
    with HostReads(found.append):
        clipping.counts()
    assert found == ["clipping.py"]
