"""One pass of the generator for E-step and M-step where z does not move, and the weighting "adaptive"."""

import dataclasses

import pytest
import torch
from helpers import threads
from test_trainer import assert_same_state, config, digits_teacher, points_teacher, states

from emd_fast import EMDTrainer, Noise
from emd_fast.em.e_step import sample_eps_z
from emd_fast.em.e_step_xz import sample_x_z
from emd_fast.em.m_step import WEIGHTINGS, weight_of
from emd_fast.em.types import LangevinSettings
from emd_fast.train.posterior import PosteriorSampler


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def passes(trainer):
    """Counts the passes of generator, teacher and fake score in one step."""
    counts = {"generator": 0, "teacher": 0, "fake_score": 0}
    hooks = []
    for name in counts:

        def count(*_, name=name):
            counts[name] += 1

        hooks.append(getattr(trainer, name).register_forward_hook(count))
    trainer.step()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize(
    ("changes", "generator"),
    [
        ({"objective": "vsd"}, 3),  # two updates of the fake score, and one pass for both steps
        ({"gamma_z": 0.0}, 3),
        ({"objective": "vsd", "micro_batch_size": 4}, 8),  # 2 x 2, then E-step and M-step for each half
        ({}, 5),
        ({"sampling": "x_z"}, 7),
        ({"sampling": "x_z", "gamma_z": 0.0}, 4),
    ],
)
def test_the_generator_runs_once_where_z_does_not_move(changes, generator):
    trainer = EMDTrainer(points_teacher(), config(**changes))
    counts = passes(trainer)
    assert counts["generator"] == generator
    assert all(record.posterior.generated is None for record in trainer._records)  # no graph is held


@pytest.mark.parametrize("changes", [{"objective": "vsd"}, {"gamma_z": 0.0}, {"objective": "vsd", "rungs": 2}])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_step_is_that_of_two_passes(changes, precision, monkeypatch):
    settings = config(num_classes=3, precision=precision, **changes)
    once, twice = (EMDTrainer(digits_teacher(), settings) for _ in range(2))
    metrics = [once.step()]
    monkeypatch.setattr(PosteriorSampler, "_keeps_pass", lambda self, batch: False)
    metrics.append(twice.step())
    for key, value in metrics[1].items():
        assert metrics[0][key].item() == pytest.approx(value.item(), rel=1e-4 if precision == "float32" else 0.02), key
    if precision == "float32":
        first, second = states(once), states(twice)
        for key, value in second.items():
            # Adam's first step is the sign of the gradient, so that rounding shows where it is near 0.
            assert (first[key] - value).abs().mean() < 1e-5, key


def inputs():
    trainer = EMDTrainer(digits_teacher(null_cond=0), config(num_classes=3, fuse=False))
    trainer.update_fake_score()
    generator = torch.Generator().manual_seed(3)
    z, eps = torch.randn(2, 8, 1, 8, 8, generator=generator)
    networks = trainer.generator, trainer.teacher, trainer.fake_score
    return networks, z, eps, torch.logspace(-1, 0.5, 8), torch.arange(8) % 3


@pytest.mark.parametrize("sampler", [sample_eps_z, sample_x_z])
@pytest.mark.parametrize("guidance", [None, 2.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_distance_is_that_of_the_last_step(sampler, guidance, steps):
    networks, z, eps, t, cond = inputs()
    seen = []
    settings = LangevinSettings(steps, 0.2, 0.01, Noise(0), guidance, measures=True)
    found = sampler(networks, z, eps, t, cond, settings, lambda step: seen.append((step.x0, step.eps.clone())))
    x0 = seen[-1][0]
    before = eps if steps == 1 else seen[-2][1]
    if sampler is sample_x_z and steps > 1:  # x moves by itself: its noise is relative to the sample before
        settings = dataclasses.replace(settings, steps=steps - 1)
        end = sampler(networks, z, eps, t, cond, settings)
        before = end.eps
    x_t = x0 + t[:, None, None, None] * before
    with torch.no_grad():
        denoised = networks[1].denoise(x_t, t, cond, guidance)
    torch.testing.assert_close(found.teacher_distance, (x0 - denoised).abs().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
    plain = sampler(networks, z, eps, t, cond, LangevinSettings(steps, 0.2, 0.01, Noise(0), guidance))
    assert plain.teacher_distance is None


def test_adaptive_vsd_is_the_update_of_dmd():
    """The gradient to x is (D_fake - D_teacher) / mean |x - D_teacher|, for n elements a sample."""
    networks, z, eps, t, cond = inputs()
    settings = LangevinSettings(1, 0.2, 0.0, Noise(0), measures=True)
    found = sample_eps_z(networks, z, eps, t, cond, settings)
    with torch.no_grad():
        x = networks[0](z, cond)
        x_t = x + t[:, None, None, None] * eps
        teacher, fake = (network.denoise(x_t, t, cond) for network in networks[1:])
    expected = (fake - teacher) / (x - teacher).abs().mean((1, 2, 3), keepdim=True)
    weight = weight_of("adaptive", found) / 0.2
    gradient = -(weight * found.alpha / found.sigma)[:, None, None, None] * found.drift
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)
    assert expected.abs().max() > 1e-3


def test_adaptive_needs_the_distance_and_others_do_not():
    networks, z, eps, t, cond = inputs()
    found = sample_eps_z(networks, z, eps, t, cond, LangevinSettings(1, 0.2, 0.0, Noise(0)))
    with pytest.raises(ValueError, match='"adaptive" needs an E-step with teacher_distance'):
        weight_of("adaptive", found)
    assert torch.equal(weight_of("sigma2", found), WEIGHTINGS["sigma2"](found.alpha, found.sigma))


@pytest.mark.parametrize("changes", [{"objective": "vsd"}, {"sampling": "x_z"}, {"guidance": 1.5}])
def test_a_run_with_adaptive_weights_makes_no_pass_more(changes):
    adaptive, plain = (
        EMDTrainer(digits_teacher(null_cond=0), config(num_classes=3, weighting=weighting, **changes))
        for weighting in ("adaptive", "sigma2")
    )
    assert passes(adaptive) == passes(plain)
    assert all(value.isfinite() for value in adaptive.step().values())


def test_a_run_with_adaptive_weights_resumes_bit_for_bit(tmp_path):
    whole, half = (EMDTrainer(points_teacher(), config(weighting="adaptive", objective="vsd")) for _ in range(2))
    whole.step(), whole.step(), half.step()
    half.save(tmp_path / "half")
    resumed = EMDTrainer.resume(tmp_path / "half", points_teacher())
    resumed.step()
    assert_same_state(whole, resumed)
