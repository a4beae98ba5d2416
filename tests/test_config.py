from __future__ import annotations

import dataclasses

import pytest
import tomli_w

from emd_fast import config
from emd_fast.cli.options import overrides
from emd_fast.config import ConfigError, EMDConfig, RunConfig, TimeDistribution


@pytest.mark.parametrize("name", config.recipes())
def test_recipes_survive_the_way_through_toml(name, tmp_path):
    settings = config.load(name)
    path = tmp_path / "again.toml"
    path.write_text(tomli_w.dumps(config.to_dict(settings)))
    assert config.load(str(path)) == settings


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "steps must be above 0"),
        ({"steps": 1.5}, "steps must be int"),
        ({"steps": True}, "steps must be int"),
        ({"langevin_steps": 0}, "langevin_steps"),
        ({"gamma_eps": 0.0}, "gamma_eps must be in (0, 1)"),
        ({"gamma_eps": 1.0}, "gamma_eps must be in (0, 1)"),
        ({"gamma_z": -0.1}, "gamma_z must be in [0, 1)"),
        ({"gamma_z": 1.2}, "gamma_z must be in [0, 1)"),
        ({"gamma_z": float("nan")}, "gamma_z"),
        ({"gamma_z": [[0.5, 0.01], [0.1, 0.001]]}, "rising"),
        ({"fake_score_updates": 0}, "nothing learns"),
        ({"sampling": "xz"}, "'x_z'"),
        ({"weighting": "sgima2"}, "did you mean 'sigma2'"),
        ({"betas": [0.0]}, "betas"),
        ({"seed": -1}, "seed"),
        ({"micro_batch_size": -1}, "micro_batch_size must be at least 0"),
        ({"shard_group": -2}, "shard_group must be at least 0"),
        ({"parallel": "ddp"}, "parallel must be one of"),
        ({"optimizer": "adamw8"}, "did you mean 'adamw"),
        ({"lr_schedule": "cosin"}, "did you mean 'cosine'"),
        ({"lr_end": 1.5}, "lr_end must be in [0, 1]"),
        ({"ema_profile": "powr"}, "did you mean 'power'"),
        ({"ema_power": 0.0}, "ema_power must be above 0"),
        ({"ema_half_life": -1.0}, "ema_half_life must be above 0"),
        ({"time_distribution": {"low": 2.0, "high": 1.0}}, "low"),
        ({"time_distribution": {"kidn": "log_normal"}}, "did you mean 'kind'"),
    ],
)
def test_a_wrong_value_is_named(changes, said):
    with pytest.raises(ConfigError) as error:
        config.from_dict(EMDConfig, changes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_words_of_an_earlier_release_are_refused_in_one_line(tmp_path):
    path = tmp_path / "old.toml"
    path.write_text('task = "gmm"\n[emd]\nstudent_lr = 1e-3\n')
    with pytest.raises(ConfigError, match=r"old\.toml: 'student_lr' is a key of .*'fake_score_lr' now"):
        config.load(str(path))
    with pytest.raises(ConfigError, match="did you mean --fake-score-updates"):
        overrides(["--student-updates", "2"])


def test_an_unknown_key_gets_the_nearest_right_one():
    with pytest.raises(ConfigError, match=r"emd\.langevin_step'.*did you mean 'langevin_steps'"):
        config.load("gmm", {"emd.langevin_step": 3})


def test_an_unknown_recipe_gets_the_nearest_right_one():
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        config.load("digit")


def test_a_recipe_that_is_not_toml_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("steps = = 3")
    with pytest.raises(ConfigError, match=r"mine\.toml is not valid TOML"):
        config.load(str(path))
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        config.load(str(tmp_path / "none.toml"))


def test_overrides_reach_nested_tables():
    settings = config.load("gmm", {"emd.steps": 7, "emd.time_distribution.low": 0.1, "log_every": 3})
    assert (settings.emd.steps, settings.emd.time_distribution.low, settings.log_every) == (7, 0.1, 3)


def test_digits_and_classes_must_agree():
    with pytest.raises(ConfigError, match="num_classes must be 10"):
        RunConfig(task="digits", emd=EMDConfig(num_classes=0))


def test_safe_conversions_are_made():
    made = EMDConfig(gamma_z=0, betas=[0, 0.9], time_distribution={"high": 3})
    assert made.gamma_z == 0.0 and isinstance(made.gamma_z, float)
    assert made.betas == (0.0, 0.9)
    assert made.time_distribution == TimeDistribution(high=3.0)


def test_every_field_is_documented():
    for item in dataclasses.fields(EMDConfig):
        assert item.name in EMDConfig.__doc__, item.name
