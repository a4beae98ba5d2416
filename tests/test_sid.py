"""Score identity distillation as an objective: its gradient, by hand, and a run."""

import pytest
import torch
from helpers import threads
from test_shared_pass import inputs, passes
from test_trainer import assert_same_state, config, digits_teacher, points_teacher

from emd_fast import EMDTrainer, Noise
from emd_fast.config import ConfigError
from emd_fast.em.m_step import m_step, weight_of
from emd_fast.em.sid import sample_sid
from emd_fast.em.types import LangevinSettings
from emd_fast.train.posterior import PosteriorSampler


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.mark.parametrize("guidance", [None, 1.7])
def test_the_m_step_has_the_gradient_of_the_published_loss(guidance):
    networks, z, eps, t, cond = inputs()
    generator, teacher, fake_score = networks
    settings = LangevinSettings(1, 0.2, 0.0, Noise(0), guidance, measures=True)
    sampled = sample_sid(networks, z, eps, t, cond, settings)
    parameters = list(generator.parameters())
    mine = torch.autograd.grad(m_step(generator, sampled, weight_of("adaptive", sampled)).sum(), parameters)
    assert all(parameter.requires_grad for parameter in fake_score.parameters())  # frozen inside alone

    x = generator(z, cond)
    x_t = x + t[:, None, None, None] * eps
    real, fake = teacher.denoise(x_t, t, cond, guidance), fake_score.denoise(x_t, t, cond)
    factor = (x - real).abs().mean((1, 2, 3), keepdim=True).detach()
    loss = (real - fake) * ((real - x) - 1.2 * (real - fake)) / factor
    expected = torch.autograd.grad(loss.mean((1, 2, 3)).sum(), parameters)
    scale = max(gradient.abs().max() for gradient in expected)
    assert scale > 1e-4
    for found, wanted in zip(mine, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-4 * scale.item())


def test_a_step_makes_one_pass_of_each_network_besides_the_updates_of_the_fake_score(monkeypatch):
    settings = config(objective="sid", weighting="adaptive", num_classes=3)
    once, twice = (EMDTrainer(digits_teacher(), settings) for _ in range(2))
    assert passes(once) == {"generator": 3, "teacher": 1, "fake_score": 3}
    monkeypatch.setattr(PosteriorSampler, "_keeps_pass", lambda self, batch: False)
    assert passes(twice)["generator"] == 4
    assert once.diagnostics().keys() == twice.diagnostics().keys()
    for key, value in twice.diagnostics().items():
        if value.isfinite():
            assert once.diagnostics()[key].item() == pytest.approx(value.item(), rel=1e-3, abs=1e-5), key


def test_a_run_resumes_bit_for_bit(tmp_path):
    settings = config(objective="sid", weighting="adaptive")
    whole, half = (EMDTrainer(points_teacher(), settings) for _ in range(2))
    whole.step(), whole.step(), half.step()
    half.save(tmp_path / "half")
    resumed = EMDTrainer.resume(tmp_path / "half", points_teacher())
    resumed.step()
    assert_same_state(whole, resumed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise_cancellation": False}, "noise_cancellation must be True for objective"),
        ({"sampling": "x_z"}, "sampling must be 'eps_z' for objective"),
        ({"cuda_graph": True}, "cuda_graph must be False for objective"),
    ],
)
def test_keys_of_a_chain_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(objective="sid", **changes)
