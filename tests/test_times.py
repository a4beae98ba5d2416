"""Kinds of TimeDistribution against their closed forms, and where the shift of times comes from."""

import pytest
import torch

from emd_fast import Denoiser, EMDConfig, EMDTrainer, Noise, ops, schedules
from emd_fast.config import ConfigError
from emd_fast.noise import NoiseStream
from emd_fast.teachers.mlp import TimeMLP
from emd_fast.train.checkpoint import CheckpointError

SAMPLES, LOW, HIGH = 4096, 0.02, 25.0


class Scheduled(Denoiser):
    """A rectified flow whose scheduler has a shift."""

    shift = 3.0


def teacher(kind=Denoiser, schedule=None) -> Denoiser:
    return kind(TimeMLP(2, 16, 1, seed=1), schedule or schedules.RectifiedFlow(), "x0", sample_shape=(2,))


def config(**times) -> EMDConfig:
    return EMDConfig(steps=2, batch_size=8, langevin_steps=1, t_star=0.5, time_distribution=times)


def drawn(teacher, **times):
    """Times (SAMPLES,) float64 of the E-step of step 5, and the uniform numbers of their noise stream."""
    trainer = EMDTrainer(teacher, config(low=LOW, high=HIGH, **times))
    trainer.batches.at(5)
    t = trainer.batches.times(trainer.config.time_distribution, SAMPLES, stream=NoiseStream.E_STEP_TIME)
    return t.double(), ops.uniform((SAMPLES,), Noise(0, step=5), stream=NoiseStream.E_STEP_TIME).double()


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifted_times_are_quantiles_of_the_shifted_uniform_distribution(shift):
    t, uniform = drawn(teacher(), kind="shifted", shift=shift)

    def plain(shifted):  # the t of s t / (1 + (s - 1) t)
        return shifted / (shift - (shift - 1) * shifted)

    first, last = plain(LOW / (1 + LOW)), plain(HIGH / (1 + HIGH))
    torch.testing.assert_close(plain(t), first + (last - first) * uniform, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", [schedules.EDM(), schedules.Cosine(), schedules.RectifiedFlow()])
def test_karras_times_are_spaced_as_the_steps_of_edm(schedule):
    t, uniform = drawn(teacher(schedule=schedule), kind="karras")
    ratio = schedule.sigma(t) / schedule.alpha(t)
    expected = (LOW ** (1 / 7) + uniform * (HIGH ** (1 / 7) - LOW ** (1 / 7))) ** 7
    torch.testing.assert_close(ratio, expected, rtol=2e-5, atol=0)


def test_the_shift_is_that_of_the_scheduler_unless_it_is_given():
    for given, shift in ({}, 3.0), ({"shift": 2.0}, 2.0):
        made = EMDTrainer(teacher(Scheduled), config(kind="shifted", **given))
        assert made.config.time_distribution.shift == shift
        assert made.config.fake_score_time_distribution.shift is None
    assert torch.equal(drawn(teacher(Scheduled), kind="shifted")[0], drawn(teacher(), kind="shifted", shift=3.0)[0])


@pytest.mark.parametrize("name", ["time_distribution", "fake_score_time_distribution"])
@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (schedules.EDM(), r"needs a rectified flow, got a teacher of EDM\(\): give another kind$"),
        (schedules.RectifiedFlow(), "needs a shift, and the teacher has no scheduler that says one: give it$"),
    ],
)
def test_a_teacher_that_shifted_times_do_not_fit(schedule, said, name):
    with pytest.raises(ConfigError, match=f'^{name} of kind "shifted" {said}'):
        EMDTrainer(teacher(schedule=schedule), EMDConfig(t_star=0.5, **{name: {"kind": "shifted"}}))


def test_a_run_goes_on_with_the_shift_that_it_began_with(tmp_path):
    given = config(kind="shifted")
    EMDTrainer(teacher(Scheduled), given).save(tmp_path / "saved")
    again = EMDTrainer.resume(tmp_path / "saved", teacher(Scheduled), config=given)
    assert again.config.time_distribution.shift == 3.0
    moved = teacher(Scheduled)
    moved.shift = 6.0
    assert EMDTrainer.resume(tmp_path / "saved", moved).config.time_distribution.shift == 3.0
    with pytest.raises(CheckpointError, match=r"time_distribution\.shift = 3\.0, not 6\.0"):
        EMDTrainer.resume(tmp_path / "saved", moved, config=given)
