"""The statistics in a VAE's configuration: which are accepted, and the one line for the others."""

import math

import pytest

from emd_fast.config import ConfigError
from emd_fast.teachers.diffusers.latents import check_statistics

GOOD = {"scaling_factor": 0.18215, "shift_factor": None, "latents_mean": [0.0, -1.0], "latents_std": (1, 0.5)}


@pytest.mark.parametrize("change", [{}, {"shift_factor": -0.1}, {"latents_mean": None}, {"scaling_factor": 1}])
def test_good_statistics(change):
    check_statistics({**GOOD, **change}, 2)
    check_statistics({}, 2)


@pytest.mark.parametrize("value", [0, -1, 0.0, math.nan, math.inf, "0.18", True, [1.0], 10**400])
def test_a_scale_is_a_positive_number(value):
    with pytest.raises(ConfigError, match=r"the VAE has scaling_factor = .*: a positive number is needed") as error:
        check_statistics({**GOOD, "scaling_factor": value}, 2)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("value", [math.nan, -math.inf, "1", False, [1.0], 10**400])
def test_a_shift_is_a_finite_number(value):
    with pytest.raises(ConfigError, match="shift_factor"):
        check_statistics({**GOOD, "shift_factor": value}, 2)


@pytest.mark.parametrize("key", ["latents_mean", "latents_std"])
@pytest.mark.parametrize("value", [1.0, [], [1.0], [1.0, 2.0, 3.0], [1.0, math.nan], [1.0, "2"], [1.0, None], "ab", {}])
def test_there_is_a_number_for_each_channel(key, value):
    with pytest.raises(ConfigError, match=f"the VAE has .*{key}"):
        check_statistics({**GOOD, key: value}, 2)


def test_a_standard_deviation_is_positive():
    for value in (0.0, -1.0):
        with pytest.raises(ConfigError, match="in latents_std: a positive number"):
            check_statistics({**GOOD, "latents_std": [1.0, value]}, 2)
