"""Kernels of a traced Langevin step, and their bytes: they are not to grow again."""

from collections import Counter
from functools import partial

import pytest
import torch
from networks import own_edm, unet2d_condition

from benchmarks import launches
from benchmarks.networks import NETWORKS, NetworkSpec, _Sample

pytest.importorskip("triton")  # whose plan says how many kernels a group norm is


def counted(network, batch):
    kernels = launches.langevin_step(network, batch)
    launched, size = Counter(), Counter()
    for each in kernels:
        launched[each.kind] += each.launches
        size[each.kind] += each.bytes
    return launched, size


def text_unet():
    return _Sample(unet2d_condition())


TINY = {
    "own adm": NetworkSpec(partial(own_edm, "adm"), (3, 8, 8), classes=10),
    "own ddpm++": NetworkSpec(partial(own_edm, "ddpmpp"), (3, 8, 8), classes=10),
    "unet2d_condition": NetworkSpec(text_unet, (4, 8, 8), text=(77, 24)),
}


# Convolutions whose bias is not before a norm and not at the end of a block, a network: the first and the last, that of
# a resampling, and a projection before tokens. Song multiplies by a scale that is not 1.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "biases"), [("own adm", 2), ("own ddpm++", 2), ("unet2d_condition", 8)])
def test_small_networks(monkeypatch, name, biases):
    monkeypatch.setitem(NETWORKS, name, TINY[name])
    launched, size = counted(name, 2)
    assert not launched["factor of 1"] and not launched["layer norm of PyTorch"]
    assert launched["convolution bias"] == 3 * biases
    assert launched["residual"] and (launched["layer norm"] > 0) == (launched["GEGLU"] > 0) == ("condition" in name)
    assert launched["Langevin step"] == 3 and all(size.values())


FULL = [
    # launches, and GB: biases left, layer norms
    pytest.param("adm", 16, 1750, 0.16, 0.0, marks=pytest.mark.slow),
    pytest.param("sd15", 4, 2450, 0.9, 2.62, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "batch", "most", "biases", "layer_norms"), FULL)
def test_networks_at_full_size(name, batch, most, biases, layer_norms):
    if name == "sd15":
        pytest.importorskip("diffusers")
    launched, size = counted(name, batch)
    assert 1000 < launched.total() <= most
    assert not size["factor of 1"] and not size["layer norm of PyTorch"]
    assert size["convolution bias"] <= biases * 1e9 and size["layer norm"] <= layer_norms * 1e9


def test_an_op_without_a_rule_is_not_passed_over():
    with launches.Counting() as counting:
        counting.counts = True
        with pytest.raises(NotImplementedError, match="aten::cosh has no rule"):
            torch.ones(2).cosh()


def test_what_a_call_reads_and_writes():
    x, weight, bias, wide = (torch.zeros(size) for size in ((2, 8, 4, 4), (8, 8, 3, 3), (8,), (8, 1, 1)))
    with launches.Counting() as counting:
        counting.counts = True
        torch.nn.functional.conv2d(x, weight, bias, padding=1)
        (x + wide) * 1.0
        x.mul_(2).view(2, -1)
        x + wide.expand(2, 8, 4, 4)
    once = x.numel() * 4
    found = [(kernels.kind, kernels.launches, kernels.bytes) for kernels in counting.kernels]
    assert found == [
        ("convolution", 1, 2 * once + 8 * 8 * 9 * 4), ("convolution bias", 1, 2 * once + 32),
        ("elementwise", 1, 2 * once + 32), ("factor of 1", 1, 2 * once), ("elementwise", 1, 2 * once),
        ("elementwise", 1, 2 * once + 32),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_prints_a_table(monkeypatch, capsys):
    monkeypatch.setitem(NETWORKS, "own adm", TINY["own adm"])
    launches.main(["own adm", "--batch", "1"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("| kernels | launches") and rows[-1].startswith("| all |") and len(rows) > 8
