"""Every schedule against its formula in float64, its inverse, and its domain."""

import copy
import math
import pickle

import pytest
import torch
from helpers import assert_within

from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow, Schedule
from emd_fast.em.score_difference import ScoreDifference

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
SCHEDULES = [EDM(), Cosine(), RectifiedFlow(), VP(BETAS), VP([0.1, 0.2, 0.3])]


def by_formula(schedule, t):
    """alpha and sigma in float64."""
    t = t.double()
    match schedule:
        case EDM():
            return torch.ones_like(t), t
        case Cosine():
            return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
        case RectifiedFlow():
            return 1 - t, t
        case VP():
            betas = BETAS if schedule.indices == 1000 else torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
            log_alpha = torch.log(torch.cumprod(1 - betas, 0)) / 2
            place = t * (len(betas) - 1)
            index = place.floor().long().clamp(0, len(betas) - 2)
            log_alpha = log_alpha[index] + (place - index) * (log_alpha[index + 1] - log_alpha[index])
            return torch.exp(log_alpha), torch.sqrt(1 - torch.exp(2 * log_alpha))


def times(schedule, n=1001):
    if isinstance(schedule, EDM):
        return torch.exp(torch.linspace(math.log(schedule.t_min), math.log(schedule.t_max), n))
    return torch.linspace(schedule.t_min, schedule.t_max, n)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_alpha_sigma_log_snr_and_its_inverse(schedule):
    t = times(schedule)
    alpha, sigma = by_formula(schedule, t)
    for mine, exact in ((schedule.alpha(t), alpha), (schedule.sigma(t), sigma)):
        assert mine.dtype == torch.float32
        # A few float32 roundings, relative where alpha or sigma is small; t itself is exact.
        assert_within(mine, exact, 4e-7 + 2e-6 * exact)
    exact = torch.log(alpha**2 / sigma**2)
    # A relative error of 2e-6 in alpha or sigma; toward the far end of VP, a rounding of t moves log alpha.
    log_snr = schedule.log_snr(t)
    assert_within(log_snr, exact, 1e-5 + 2e-6 * exact.abs(), "log_snr")
    back = schedule.t_from_log_snr(log_snr)
    assert back.dtype == torch.float32
    # In log-SNR: where it is flat in t, t cannot be told, and where it is steep one rounding of t shows.
    rounding = (schedule.log_snr(torch.nextafter(t, t.new_tensor(schedule.t_min))) - log_snr).abs()
    tolerance = (1e-4 + 2 * rounding).double()
    assert_within(schedule.log_snr(back.clamp(schedule.t_min, schedule.t_max)), log_snr, tolerance)
    assert bool((log_snr.diff() < 0).all()), "noise grows with t"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_ends_are_inside_and_the_inverse_beyond_them(schedule):
    t = schedule.t_from_log_snr(torch.tensor([-60.0, 60.0]))
    assert bool(torch.isfinite(t).all())
    low, high = getattr(schedule, "domain", (0, 1))
    assert low <= t[1] < t[0] <= high
    if isinstance(schedule, VP):
        assert t.tolist() == [1.0, 0.0]
    schedule.alpha(t)  # and it is a time that the schedule takes
    ends = torch.tensor([schedule.t_min, schedule.t_max])
    for values in (schedule.sigma(ends), schedule.alpha(ends), schedule.log_snr(ends).exp()):
        assert bool((values > 0).all()) and bool(values.isfinite().all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_bad_input_is_named(schedule):
    outside = [-1e-3, math.nan, math.inf, -math.inf, *([] if isinstance(schedule, EDM) else [1.001])]
    for function in (schedule.alpha, schedule.sigma, schedule.log_snr):
        for bad in outside:
            with pytest.raises(ValueError, match="t must be in"):
                function(torch.tensor([0.5, bad]))
        for bad in (0.5, torch.tensor([1]), None):
            with pytest.raises(TypeError, match="t must be"):
                function(bad)
    with pytest.raises(ValueError, match="log_snr"):
        schedule.t_from_log_snr(torch.tensor([0.0, math.nan]))
    for bad in (0.0, torch.tensor([1])):
        with pytest.raises(TypeError, match="log_snr"):
            schedule.t_from_log_snr(bad)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_equality_copies_pickles_and_empty_batches(schedule):
    for function in (schedule.alpha, schedule.sigma, schedule.log_snr, schedule.t_from_log_snr):
        assert function(torch.empty(0)).shape == (0,)
    for same in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert same == schedule and hash(same) == hash(schedule)
    assert all(schedule != other for other in SCHEDULES if other is not schedule)
    assert isinstance(schedule, Schedule)


@pytest.mark.parametrize("betas", [[0.1], [], [[0.1, 0.2]], [0.1, 1.0], [0.0, 0.1], [-0.1, 0.1], [0.1, math.nan]])
def test_betas_that_are_none(betas):
    with pytest.raises(ValueError, match="betas"):
        VP(betas)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_compiles_without_a_graph_break(schedule):
    t = times(schedule, 5)

    def everything(t):
        return schedule.alpha(t), schedule.sigma(t), schedule.t_from_log_snr(schedule.log_snr(t))

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for mine, exact in zip(compiled(t), everything(t), strict=True):
        assert_within(mine, exact, 1e-6)


class Squared:
    # A variance-exploding schedule of a user's own: sigma = t^2, and no base class.
    t_min, t_max = 0.1, 3.0

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return t**2

    def log_snr(self, t):
        return -4 * torch.log(t)

    def t_from_log_snr(self, log_snr):
        return torch.exp(-log_snr / 4)


def test_any_object_with_the_members_is_a_schedule():
    assert isinstance(Squared(), Schedule)
    t, x = torch.tensor([0.5, 2.0]), torch.randn(2, 3)
    denoiser = Denoiser.from_x0(lambda x_t, t, cond: 0 * x_t, Squared())
    assert torch.allclose(denoiser.score(x, t), -x / t[:, None] ** 4)
    # The preconditioning of EDM is a function of sigma, not of the name that the schedule gives to time.
    seen = []
    Denoiser(lambda x, t, cond: seen.extend([x, t]) or x, Squared(), "edm", sigma_data=0.5)(x, t)
    assert torch.allclose(seen[0], x / torch.sqrt(t**4 + 0.25)[:, None])
    assert torch.allclose(seen[1], torch.log(t**2) / 4)
    with pytest.raises(TypeError, match="schedule"):
        Denoiser(lambda x, t, cond: x, object(), "x0")


def test_a_copied_denoiser_keeps_its_schedule():
    """A fake score starts as a copy of the teacher: they must share a schedule whatever equality it knows."""
    teacher = Denoiser(torch.nn.Linear(1, 1), Squared(), "x0")
    fake_score = copy.deepcopy(teacher)
    assert fake_score.network is not teacher.network and fake_score.schedule is teacher.schedule
    assert not ScoreDifference(teacher, fake_score, torch.tensor([0.5]), None, None, None).needs_x
