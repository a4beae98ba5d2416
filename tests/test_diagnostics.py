"""What is logged about a step: its values against float64, and that nobody waits for a device to get them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from helpers import normals

from emd_fast import Denoiser, EMDConfig, EMDTrainer, diagnostics, schedules
from emd_fast.config import TimeDistribution
from emd_fast.em.m_step import WEIGHTINGS
from emd_fast.noise import Stream
from emd_fast.teachers.mlp import TimeMLP
from emd_fast.teachers.small_unet import SmallUNet


def points_teacher(schedule=None) -> Denoiser:
    schedule = schedule or schedules.EDM()
    form = {"sigma_data": 0.5} if isinstance(schedule, schedules.EDM) else {}
    return Denoiser(TimeMLP(2, 16, 1, seed=1), schedule, "edm" if form else "eps", sample_shape=(2,), **form)


def config(**changes) -> EMDConfig:
    return EMDConfig(**{"steps": 4, "batch_size": 11, "langevin_steps": 2, "t_star": 0.5, **changes})


def by_hand(trainer: EMDTrainer, sampled, generated) -> dict[str, float]:
    """The same statistics in float64, one sample after the other, from what the E-step returned and the M-step saw."""
    settings, step, batch = trainer.config, trainer.steps_done - 1, trainer.config.batch_size
    z, eps, drift, alpha, sigma = (
        x.double() for x in (sampled.z, sampled.eps, sampled.drift, sampled.alpha, sampled.sigma)
    )
    z_0 = torch.as_tensor(normals(z.shape, seed=settings.seed, step=step, stream=Stream.E_STEP_Z))
    eps_0 = torch.as_tensor(normals(eps.shape, seed=settings.seed, step=step, stream=Stream.E_STEP_EPS))
    weight = WEIGHTINGS[settings.weighting](alpha, sigma)
    if settings.objective == "vsd":
        weight = weight / settings.gamma_eps
    scale = (weight * alpha / sigma)[:, None]
    x = generated.double()
    found = {
        "sample_mean": x.mean(),
        "sample_std": x.std(correction=0),
        "z_moved_rms": (z - z_0).square().mean().sqrt(),
        "eps_moved_rms": (eps - eps_0).square().mean().sqrt(),
        "signal_var_drift": (scale * drift).var(0, correction=0).mean(),
        "signal_var_eps": (scale * eps).var(0, correction=0).mean(),
    }
    low, high = settings.time_distribution.low, settings.time_distribution.high
    edges = torch.linspace(-2 * math.log(high), -2 * math.log(low), diagnostics.BINS + 1).tolist()
    for i in range(diagnostics.BINS):
        mine = [
            drift[b].square().mean()
            for b in range(batch)
            if edges[i] <= 2 * math.log(alpha[b] / sigma[b]) < edges[i + 1]
        ]
        found[f"drift_rms_bin{i}"] = (sum(mine) / len(mine)) ** 0.5 if mine else math.nan
    return {name: float(value) for name, value in found.items()}


def watched_step(trainer: EMDTrainer):
    """A step, with what its M-step had: the E-step of all samples and g(z_K), by another way than the trainer's own."""
    before = copy.deepcopy(trainer.generator)
    pieces, original = [], trainer._e_step
    trainer._e_step = lambda piece: pieces.append(original(piece)) or pieces[-1]
    trainer.step()
    del trainer._e_step
    parts = {name: torch.cat([getattr(p, name) for p in pieces]) for name in ("z", "eps", "drift", "alpha", "sigma")}
    with torch.no_grad():
        generated = before(parts["z"], None)
    return type("Sampled", (), parts), generated


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch_size": 4, "gamma_z": 0.0, "weighting": "sigma_over_alpha"},
        {"objective": "vsd", "gamma_eps": 0.25},
        {"noise_cancellation": False, "batch_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("schedule", [schedules.EDM(), schedules.Cosine()], ids=repr)
def test_every_value_is_that_of_float64_by_hand(changes, schedule):
    trainer = EMDTrainer(points_teacher(schedule), config(**changes))
    for _ in range(2):
        sampled, generated = watched_step(trainer)
    found, expected = trainer.diagnostics(), by_hand(trainer, sampled, generated)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == () and value.dtype == torch.float32, name
        # Normals are right to 5e-6, sums of float32 to some 1e-6 of their size.
        assert value.item() == pytest.approx(expected[name], rel=2e-5, abs=2e-5, nan_ok=True), name
    bins = [found[f"drift_rms_bin{i}"].item() for i in range(diagnostics.BINS)]
    assert any(map(math.isfinite, bins))
    if trainer.config.batch_size < diagnostics.BINS:
        assert any(map(math.isnan, bins))


def test_displacement_without_moves_of_z_is_nothing_and_noise_is_most_of_the_signal():
    trainer = EMDTrainer(points_teacher(), config(gamma_z=0.0, batch_size=256))
    trainer.step()
    found = trainer.diagnostics()
    assert found["z_moved_rms"].item() == 0.0
    assert found["signal_var_eps"] > 10 * found["signal_var_drift"] > 0


def test_the_bins_divide_the_range_in_which_t_is_drawn_as_far_as_the_schedule_goes():
    low, width = diagnostics.log_snr_bins(schedules.EDM(), TimeDistribution(low=0.05, high=5.0))
    assert low == pytest.approx(-2 * math.log(5)) and 8 * width == pytest.approx(2 * math.log(100))
    low, width = diagnostics.log_snr_bins(schedules.EDM(), TimeDistribution(low=1e-6, high=1e6))
    assert low == pytest.approx(-2 * math.log(80), rel=1e-5) and 8 * width == pytest.approx(
        2 * math.log(40_000), rel=1e-5
    )


def test_a_sample_that_is_not_finite_stays_in_its_bin():
    trainer = EMDTrainer(points_teacher(), config(batch_size=64))
    trainer.step()
    healthy = trainer.diagnostics()
    trainer._seen[0].sampled.drift[0] = math.nan
    ill = trainer.diagnostics()
    changed = [name for name in healthy if "bin" in name and not torch.equal(healthy[name], ill[name])]
    assert len(changed) == 1 and ill[changed[0]].isnan()


def test_looking_does_not_change_the_training():
    network = SmallUNet(1, 8, num_classes=3)
    teacher = Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(1, 8, 8))
    watched, alone = (EMDTrainer(teacher, config(num_classes=3, micro_batch_size=4)) for _ in range(2))
    for _ in range(3):
        said = watched.step()
        watched.diagnostics()
        assert all(torch.equal(value, said[name]) for name, value in alone.step().items())
    for name, value in alone.generator.state_dict().items():
        assert torch.equal(value, watched.generator.state_dict()[name]), name


def test_there_are_no_diagnostics_before_a_step():
    with pytest.raises(RuntimeError, match="call step"):
        EMDTrainer(points_teacher(), config()).diagnostics()
