from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch
from torch import nn

from emd_fast import EMDConfig, optimizers
from emd_fast.config import ConfigError


def parameters():
    return [nn.Parameter(torch.ones(3))]


def test_adamw_is_the_fused_one_and_skips_on_the_device():
    optimizer = optimizers.make(EMDConfig(weight_decay=0.1, betas=(0.5, 0.9)), parameters(), 0.25)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and group["fused"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.5, 0.9), 0.1)
    assert optimizers.skips_on_device(optimizer)
    assert not optimizers.skips_on_device(torch.optim.SGD(parameters(), 0.1))


@pytest.mark.parametrize(("name", "needs"), [("apex_adamw", "NVIDIA's apex"), ("adamw_8bit", "torchao")])
def test_an_optimizer_that_is_not_installed_is_named(monkeypatch, name, needs):
    for module in ("apex", "apex.optimizers", "torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"optimizer '{name}' needs {needs}"):
        optimizers.make(EMDConfig(optimizer=name), parameters(), 0.1)


def test_another_package_called_apex_is_not_taken_for_nvidias(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.delitem(sys.modules, "apex.optimizers", raising=False)
    with pytest.raises(ConfigError, match="NVIDIA's apex"):
        optimizers.make(EMDConfig(optimizer="apex_adamw"), parameters(), 0.1)


def test_an_unknown_optimizer_gets_the_nearest_right_one():
    with pytest.raises(ConfigError, match=r"optimizer must be one of .*did you mean 'adamw'"):
        EMDConfig(optimizer="adam")


def scales(**changes):
    config = EMDConfig(**{"steps": 100, **changes})
    return [optimizers.rate_scale(config, step) for step in range(100)]


def test_rates_warm_up_and_follow_their_schedule():
    assert scales() == [1.0] * 100
    warm = scales(lr_warmup=10)
    assert warm[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and warm[10:] == [1.0] * 90
    linear = scales(lr_warmup=10, lr_schedule="linear", lr_end=0.1)
    assert linear[9] == linear[10] == 1.0 and linear[55] == pytest.approx(0.55) and linear[99] == pytest.approx(0.11)
    cosine = scales(lr_schedule="cosine")
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.5) and 0 < cosine[99] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(cosine))
