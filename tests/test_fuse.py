"""fuse(): the same numbers, parameters and keys; what it refuses; how it is copied, saved and undone."""

import copy

import pytest
import torch
from helpers import seeded
from networks import FAMILIES, make, output

import emd_fast


def gradients(network, x, arguments, weights=None):
    """The output, and the gradients of a random linear form of it: to the input, then to every parameter."""
    x = x.detach().clone().requires_grad_()
    out = output(network, x, arguments)
    cotangent = torch.randn(out.shape, generator=seeded(9)).to(out.dtype)
    parameters = list(network.parameters())
    return out, torch.autograd.grad(out, [x, *parameters], cotangent, allow_unused=True)


def relative(mine, exact):
    return ((mine.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-12)).item()


def wide(value):
    return value.double() if value.is_floating_point() else value


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_outputs_and_gradients(backend, name):
    network, x, arguments = make(name)
    exact = gradients(copy.deepcopy(network).double(), x.double(), tuple(wide(a) for a in arguments))[1]
    expected, its = gradients(network, x, arguments)
    addresses = {key: value.data_ptr() for key, value in network.state_dict().items()}
    named = {key: id(value) for key, value in network.named_parameters()}

    assert emd_fast.fuse(network) is network
    actual, mine = gradients(network, x, arguments)
    assert actual.dtype == torch.float32
    assert relative(actual, expected) < 1e-5
    assert relative(mine[0], its[0]) < 1e-5
    together = [torch.cat([g.flatten() for g in found if g is not None]) for found in (mine, its)]
    assert relative(*together) < 1e-5
    for key, a, b, e in zip(["x", *named], mine, its, exact, strict=True):
        assert (a is None) == (b is None), key
        if a is None:
            continue
        # Some gradients are small sums of large terms, of which float32 itself keeps fewer digits.
        error, own = (torch.linalg.vector_norm(g.double() - e).item() for g in (a, b))
        bound = max(1e-5 * e.norm().item(), 2 * own + 1e-7 * together[1].norm().item())
        assert error <= bound, (key, error, own, e.norm().item())

    assert addresses == {key: value.data_ptr() for key, value in network.state_dict().items()}
    assert named == {key: id(value) for key, value in network.named_parameters()}
    assert emd_fast.fusion_report(network).fused
