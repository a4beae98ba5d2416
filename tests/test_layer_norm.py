"""Fused layer norms under autocast, as they are computed on a GPU: two bytes in and out, float32 inside."""

import copy

import pytest
import torch
from helpers import assert_as_good_as_eager, assert_same, draw, seeded
from networks import make, output
from test_fuse import relative
from test_fuse_kept import kept
from test_fuse_weight_cache import BF16
from torch import nn

import emd_fast
from emd_fast.cache.weights import autocast_dtype
from emd_fast.fusion import layer_norm


@pytest.fixture(autouse=True)
def like_a_gpu(monkeypatch):
    """Tensors of a CPU are taken for those of a GPU."""
    monkeypatch.setattr(layer_norm, "_widened", lambda x: x.dim() > 1 and x.dtype == autocast_dtype("cpu"))


def norms(channels=33, affine=True):
    """(fused, as autocast on a GPU computes it), frozen."""
    torch.manual_seed(0)
    plain = nn.LayerNorm(channels, elementwise_affine=affine)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    network = nn.Sequential(plain, nn.Linear(channels, channels), nn.GroupNorm(1, channels)).requires_grad_(False)
    return emd_fast.fuse(copy.deepcopy(network))[0], lambda x: plain(x.float())


def doubles(norm):
    return [None if p is None else p.double() for p in (norm.weight, norm.bias)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [(2, 9, 33), (5, 33), (0, 4, 33)])
def test_against_float64(size, affine):
    mine, its = norms(affine=affine)
    x, cotangent = (draw(size, seeded(i), torch.bfloat16, scale=3) for i in range(2))
    exact = nn.functional.layer_norm(x.double(), (33,), *doubles(mine))
    results = []
    for run in (mine, lambda x: its(x).bfloat16()):
        leaf = x.clone().requires_grad_()
        with torch.autocast(**BF16):
            y = run(leaf)
        results.append((y, *torch.autograd.grad(y, leaf, cotangent)))
    assert results[0][0].dtype == torch.bfloat16
    assert_as_good_as_eager(results[0][0], exact, results[1][0])
    wide = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.layer_norm(wide, (33,), *doubles(mine)), wide, cotangent.double())
    assert_as_good_as_eager(results[0][1], gradient, results[1][1])


def test_what_is_kept():
    mine, _ = norms()
    x = draw((2, 9, 33), seeded(0), torch.bfloat16).requires_grad_()
    with torch.autocast(**BF16):
        held, y = kept(lambda: mine(x), [mine.weight, mine.bias])
    assert held == 2 * x.numel() + 2 * 4 * 18 and layer_norm.source(y)[1] is x


@pytest.mark.parametrize("how", ["float32 input", "no autocast", "trains"])
def test_what_stays_as_it_was(how):
    mine, its = norms()
    x = draw((2, 9, 33), seeded(0), torch.float32 if how == "float32 input" else torch.bfloat16).requires_grad_()
    if how == "trains":
        mine.requires_grad_(True)
    with torch.autocast(**BF16, enabled=how != "no autocast"):
        y = mine(x)
    assert type(y.grad_fn).__name__ == ("NativeLayerNormBackward0" if how == "trains" else "_ToInputBackward")
    assert_same(y, its(x).to(x.dtype))


@pytest.mark.parametrize("name", ["unet2d_condition", "unet2d_condition, linear, scale_shift"])
def test_a_network_is_no_worse_than_the_original(backend, monkeypatch, name):
    """The original's layer norms return float32, as under autocast on a GPU."""
    network, x, arguments = make(name)
    network.requires_grad_(False)
    plain = nn.LayerNorm.forward

    def run(network):
        leaf = x.detach().clone().requires_grad_()
        out = network(leaf, *arguments).sample
        return out, torch.autograd.grad(out, leaf, cotangent.to(out.dtype))[0]

    cotangent = torch.randn(x.shape, generator=seeded(9))
    exact = run(network)
    fused = emd_fast.fuse(copy.deepcopy(network))
    with torch.autocast(**BF16):
        mine = run(fused)
        monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, input: plain(self, input.float()))
        its = run(network)
    for a, b, right in zip(mine, its, exact, strict=True):
        assert relative(a, right) <= 1.5 * relative(b, right)


def test_equal_networks_have_equal_outputs():
    network, x, arguments = make("unet2d_condition")
    network.requires_grad_(False)
    with torch.autocast(**BF16):
        a, b = (output(emd_fast.fuse(copy.deepcopy(network)), x, arguments) for _ in range(2))
    assert_same(a, b)
