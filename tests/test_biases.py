"""Biases of convolutions that the op behind the convolution adds."""

import copy

import pytest
import torch
from helpers import assert_same, assert_within
from networks import make, output
from test_fuse import relative
from test_fuse_weight_cache import BF16
from torch import nn

import emd_fast
from emd_fast.ops import biases


def first_block(network, convolution):
    return next(m for m in network.modules() if isinstance(getattr(m, convolution, None), nn.Module))


BLOCKS = [("unet2d", "conv1"), ("unet2d, scale_shift, resnet", "conv1"), ("song", "conv0"), ("dhariwal", "conv0"),
          ("own ddpm++", "conv0"), ("own adm", "conv1")]  # fmt: skip


@pytest.mark.parametrize(("name", "convolution"), BLOCKS)
def test_a_hook_that_comes_inside_the_cache(name, convolution):
    """With a hook the convolution is called with its bias; what was kept with the bias is then another."""
    network, x, arguments = make(name)
    emd_fast.fuse(network.requires_grad_(False))
    layer = getattr(first_block(network, convolution), convolution)
    assert biases.leaves_bias(layer)
    with emd_fast.fusion.conditioning_cache(), torch.no_grad():
        first = output(network, x, arguments)
        handle = layer.register_forward_hook(lambda module, args, out: None)
        assert not biases.leaves_bias(layer)
        assert relative(output(network, x, arguments), first) < 1e-6
        handle.remove()
        assert_same(output(network, x, arguments), first)


@pytest.mark.parametrize(("name", "convolution"), BLOCKS)
def test_every_bias_is_there_once(name, convolution):
    """A large bias shows where it is left out or added twice."""
    network, x, arguments = make(name)
    with torch.no_grad():
        for module in network.modules():
            if getattr(module, "bias", None) is not None and module.bias.dim() == 1:
                module.bias += 3
    plain = copy.deepcopy(network)
    assert relative(output(emd_fast.fuse(network), x, arguments), output(plain, x, arguments)) < 1e-5


@pytest.mark.parametrize("how", ["a hook", "a subclass", "no bias", "a forward of its own", "a linear layer"])
def test_who_adds_it_itself(how):
    class Other(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    layer = {"a subclass": Other, "a linear layer": lambda *a, **k: nn.Linear(5, 5)}.get(how, nn.Conv2d)(
        4, 4, 1, bias=how != "no bias"
    )
    if how == "a hook":
        layer.register_forward_pre_hook(lambda module, args: None)
    if how == "a forward of its own":
        layer.forward = lambda x: nn.Conv2d.forward(layer, x)
    x = torch.randn(2, 4, 5, 5)
    h, bias = biases.convolved(layer, x)
    assert bias is None and not biases.leaves_bias(layer)
    assert_same(h, layer(x))


@pytest.mark.parametrize("autocast", [True, False])
def test_a_bias_is_rounded_as_autocast_does(autocast):
    """So a network whose weights were cast beforehand computes the same."""
    layer = nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast(**BF16, enabled=autocast):
        h, bias = biases.convolved(layer, x)
        expected = layer(x)
    dtype = torch.bfloat16 if autocast else torch.float32
    assert h.dtype == bias.dtype == dtype and torch.equal(bias, layer.bias.to(dtype))
    assert_within(h.float() + bias.float()[:, None, None], expected, 0.02 if autocast else 1e-6)
