import itertools
import sys
import types

import pytest
import torch
from test_trainer import assert_same_state, config, points_teacher
from torch import nn

from emd_fast import EMDTrainer
from emd_fast.config import ConfigError, OptimizerConfig
from emd_fast.train import optimizers


def parameters():
    return [nn.Parameter(torch.ones(3))]


def test_adamw_is_the_fused_one_and_skips_on_the_device():
    optimizer = optimizers.make(OptimizerConfig(weight_decay=0.1, betas=(0.5, 0.9)), parameters(), 0.25)
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW and group["fused"]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.5, 0.9), 0.1)
    assert optimizers.skips_on_device(optimizer)
    assert not optimizers.skips_on_device(torch.optim.SGD(parameters(), 0.1))


@pytest.mark.parametrize(("name", "needs"), [("apex_adamw", "NVIDIA's apex"), ("adamw_8bit", "torchao")])
def test_an_optimizer_that_is_not_installed_is_named(monkeypatch, name, needs):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))  # that of PyPI, which is another
    for module in ("apex.optimizers", "torchao", "torchao.optim"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"optimizer '{name}' needs {needs}"):
        optimizers.make(OptimizerConfig(name=name), parameters(), 0.1)


class Coarse(torch.Tensor):
    """Moments of few bits, as torchao's: multiples of 1/64 here."""

    codes = property(lambda self: self * 64)

    def copy_(self, other):
        return super().copy_((other * 64).round() / 64)

    def dequantize(self):
        return self.as_subclass(torch.Tensor).clone()


class Compiled(torch.optim.Optimizer):
    """What torchao's AdamW8bit asks of those who use it: its own rate, filled; its own buffers, kept."""

    def __init__(self, parameters, lr, **options):
        super().__init__(parameters, {"lr": torch.tensor(lr), **options})

    def _new_buffer(self, parameter, signed):
        return torch.zeros_like(parameter).detach().as_subclass(Coarse)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            assert isinstance(group["lr"], torch.Tensor)
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = self._new_buffer(parameter, True)
                    state["exp_avg_sq"] = self._new_buffer(parameter, False)
                assert isinstance(state["exp_avg"], Coarse)
                state["exp_avg"].copy_(state["exp_avg"].dequantize().lerp(parameter.grad.sign(), 0.5))
                parameter.sub_(group["lr"] * state["exp_avg"].dequantize())


def test_moments_of_few_bits_are_that_after_a_resume_too(monkeypatch, tmp_path):
    module = types.ModuleType("torchao.optim")
    module.AdamW8bit = Compiled
    monkeypatch.setitem(sys.modules, "torchao.optim", module)
    settings = config(optimizer_name="adamw_8bit", lr_warmup=4, generator_lr=0.1)
    whole, half = (EMDTrainer(points_teacher(), settings) for _ in range(2))
    for trainer in (whole, whole, half, half):
        trainer.step()
    half.save(tmp_path / "half")
    resumed = EMDTrainer.resume(tmp_path / "half", points_teacher())
    for trainer in (whole, whole, resumed, resumed):
        trainer.step()
    assert any(bool(state["exp_avg"].any()) for state in resumed.learners["generator"].optimizer.state.values())
    assert_same_state(whole, resumed)


def scales(**changes):
    return [optimizers.rate_scale(OptimizerConfig(**changes), step, steps=100) for step in range(100)]


def test_rates_warm_up_and_follow_their_schedule():
    assert scales() == [1.0] * 100
    warm = scales(lr_warmup=10)
    assert warm[:10] == pytest.approx([(i + 1) / 10 for i in range(10)]) and warm[10:] == [1.0] * 90
    linear = scales(lr_warmup=10, lr_schedule="linear", lr_end=0.1)
    assert linear[9] == linear[10] == 1.0 and linear[55] == pytest.approx(0.55) and linear[99] == pytest.approx(0.11)
    cosine = scales(lr_schedule="cosine")
    assert cosine[0] == 1.0 and cosine[50] == pytest.approx(0.5) and 0 < cosine[99] < 0.001
    assert all(a >= b for a, b in itertools.pairwise(cosine))
