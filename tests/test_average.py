from __future__ import annotations

import pytest
import torch
from torch import nn

from emd_fast.train import average
from emd_fast.train.average import EMA


def test_the_constant_profile_is_warmed_up():
    decay = average.constant(0.9)
    assert decay(0) == pytest.approx(0.1) and decay(90) == pytest.approx(0.9) and decay(10**6) == 0.9


def test_the_power_profile_starts_as_the_weights_and_weighs_the_past_by_a_power_of_time():
    decay, gamma, steps = average.power(6.94), 6.94, 1000
    assert decay(0) == 0.0
    # What step i weighs in the end: its share times all later decays; as (i / steps)^gamma, up to a constant.
    weights = []
    for i in (250, 500, 999):
        weight = 1 - decay(i)
        for later in range(i + 1, steps):
            weight *= decay(later)
        weights.append(weight)
    assert weights[1] / weights[2] == pytest.approx(0.5**gamma, rel=0.02)
    assert weights[0] / weights[1] == pytest.approx(0.5**gamma, rel=0.02)


def test_after_a_half_life_what_was_counts_half():
    decay = average.half_life(3200, batch_size=32)
    product = 1.0
    for step in range(10_000, 10_100):
        product *= decay(step)
    assert product == pytest.approx(0.5)
    assert decay(0) == pytest.approx(0.5**20)  # early in a run it is short


def test_the_average_is_of_floating_weights_and_the_rest_is_copied():
    module = nn.BatchNorm1d(2)
    average = EMA(module, 0.5)
    with torch.no_grad():
        module.weight.fill_(3.0)
        module.num_batches_tracked.fill_(7)
    average.update(module, 10**6)
    assert torch.equal(average.module.weight, torch.full((2,), 2.0))
    assert average.module.num_batches_tracked.item() == 7
    assert not any(p.requires_grad for p in average.module.parameters())
