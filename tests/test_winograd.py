"""The convolutions that the CPU computes by Winograd's algorithm: those of frozen networks in channels_last."""

from functools import partial

import pytest
import torch
from helpers import threads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.func import grad, jvp, vmap
from torch.nn.functional import conv2d
from torch.profiler import ProfilerActivity, profile

import emd_fast
from emd_fast.backends import native
from emd_fast.ops.convolution import convolution
from emd_fast.train.throughput import counted

pytestmark = pytest.mark.skipif(
    not native.is_loaded() or native.facts()["isa"] == "baseline", reason="no compiled kernel serves it here"
)

convolved = partial(convolution, padding=(1, 1))
# Batch, channels in and out, height and width: blocks of tiles with a rest and fewer tiles than one, tiles that cross
# an edge, panels of two vectors and of one, for vectors of 8 and of 16.
SHAPES = [
    (7, 16, 32, 8, 8), (3, 24, 40, 7, 5), (9, 8, 8, 2, 2), (2, 32, 16, 2, 9), (40, 48, 8, 3, 4), (2, 64, 96, 6, 6),
    (1, 80, 48, 12, 3),
]  # fmt: skip


def drawn(shape):
    batch, channels, out, *size = shape
    torch.manual_seed(0)
    x = torch.randn(batch, channels, *size)
    weight = torch.randn(out, channels, 3, 3) / (9 * channels) ** 0.5
    return x.contiguous(memory_format=torch.channels_last), weight, torch.randn(out)


def by_winograd(run):
    """What run() returns, and how many of our convolutions ran in it."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        result = run()
    return result, sum(event.name == "emd_fast::winograd" for event in profiled.events())


def error(result, exact):
    return ((result - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_derivatives_are_as_exact_as_pytorch_s(shape, with_bias, number):
    x, weight, bias = drawn(shape)
    bias = bias if with_bias else None
    cotangent = torch.randn_like(x)

    def all_of(function, x, weight, bias):
        x = x.detach().requires_grad_()
        y = function(x, weight, bias, padding=(1, 1))
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first, x, cotangent.to(x))
        return y.detach(), first.detach(), second

    exact = all_of(conv2d, x.double(), weight.double(), None if bias is None else bias.double())
    theirs = all_of(conv2d, x, weight, bias)
    with threads(number):
        mine, calls = by_winograd(lambda: all_of(convolved, x, weight, bias))
    assert calls == 4
    for result, its, true in zip(mine, theirs, exact, strict=True):
        assert result.stride() == its.stride() and result.dtype == its.dtype
        assert error(result, true) <= 2 * error(its, true) + 1e-7


@pytest.mark.parametrize("number", [1, 3])
def test_numbers_of_a_sample_do_not_depend_on_the_batch(number):
    x, weight, bias = drawn((40, 16, 24, 5, 6))
    whole = convolved(x, weight, bias)
    with threads(number):
        parts = [convolved(part, weight, bias) for part in x.split((1, 9, 13, 17))]
    assert torch.equal(torch.cat(parts), whole)


def test_a_weight_in_any_layout_and_a_slice_of_the_input():
    x, weight, bias = drawn((4, 48, 16, 6, 6))
    part = x[:, 16:32]
    layouts = (torch.contiguous_format, torch.channels_last)
    weights = [weight[:, :16].contiguous(memory_format=layout) for layout in layouts]
    weights += [weight[:, :16], weights[0].flip(1).flip(1), weights[0].transpose(0, 1).contiguous().transpose(0, 1)]
    results, calls = by_winograd(lambda: [convolved(part, one, bias) for one in weights])
    assert calls == len(weights) and all(torch.equal(result, results[0]) for result in results)
    exact = conv2d(part.double(), weights[0].double(), bias.double(), padding=1)
    assert error(results[0], exact) < 3e-7


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        ({"kernel": 1}, {"padding": (0, 0)}),
        ({"groups": 2}, {"padding": (1, 1), "groups": 2}),
        ({}, {"stride": (2, 1), "padding": (1, 1)}), ({}, {"padding": (0, 1)}),
        ({}, {"dilation": (1, 2), "padding": (1, 2)}),
        *((change, {"padding": (1, 1)}) for change in (
            {"channels": 12}, {"out": 20}, {"channels": 1024, "out": 1024}, {"batch": 0}, {"width": 1},
            {"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"layout": torch.contiguous_format},
            {"backend": "reference"},
        )),
    ],
)  # fmt: skip
def test_all_others_are_pytorch_s_bit_for_bit(change, settings):
    channels, out, kernel = change.get("channels", 16), change.get("out", 16), change.get("kernel", 3)
    g = torch.Generator().manual_seed(0)
    kind = change.get("dtype", torch.float32)
    x = torch.randn(change.get("batch", 2), channels, 6, change.get("width", 6), generator=g).to(kind)
    x = x.contiguous(memory_format=change.get("layout", torch.channels_last))
    weight = torch.randn(out, channels // change.get("groups", 1), kernel, kernel, generator=g).to(kind)
    with emd_fast.use_backend(change.get("backend", "auto")):
        mine, calls = by_winograd(lambda: convolution(x, weight, **settings))
    assert calls == 0 and torch.equal(mine, conv2d(x, weight, **settings))


def test_wrong_shapes_are_pytorch_s_errors():
    x, weight, bias = drawn((2, 16, 16, 4, 4))
    for wrong in ((x[:, :8], weight, bias), (x, weight, bias[:8]), (x, weight[:, :, :, :2], bias[:3])):
        with pytest.raises(RuntimeError):
            convolved(*wrong)


def test_what_looks_into_a_convolution_sees_pytorch_s():
    x, weight, bias = drawn((2, 16, 16, 4, 4))
    expected = conv2d(x, weight, bias, padding=1)
    batched = vmap(lambda one: convolved(one[None], weight, bias)[0])(x)
    torch.testing.assert_close(batched, expected, rtol=0, atol=1e-5)
    by_x = grad(lambda x: convolved(x, weight, bias).square().sum())(x)
    its = grad(lambda x: conv2d(x, weight, bias, padding=1).square().sum())(x)
    torch.testing.assert_close(by_x, its, rtol=0, atol=1e-4)
    _, tangent = jvp(lambda x: convolved(x, weight, bias), (x,), (x,))
    torch.testing.assert_close(tangent, conv2d(x, weight, padding=1), rtol=0, atol=1e-5)
    with FakeTensorMode() as mode:
        fake, calls = by_winograd(lambda: convolved(*map(mode.from_tensor, (x, weight, bias))))
    assert calls == 0 and fake.shape == expected.shape and fake.stride() == expected.stride()


@pytest.mark.parametrize("moved", ["x", "weight", "bias"])
def test_derivatives_forwards_by_whatever_moves(moved):
    arguments = dict(zip(("x", "weight", "bias"), drawn((2, 16, 16, 4, 4)), strict=True))
    direction = torch.randn_like(arguments[moved])

    def tangent(function):
        return jvp(lambda one: function(**{**arguments, moved: one}), (arguments[moved],), (direction,))[1]

    with dual_level():
        duals = {**arguments, moved: make_dual(arguments[moved], direction)}
        duals["x"].requires_grad_()
        plain = unpack_dual(convolved(**duals)).tangent
    expected = tangent(partial(conv2d, padding=1))
    torch.testing.assert_close(plain, expected, rtol=0, atol=1e-5)
    assert torch.equal(tangent(convolved), expected)


def test_flops_are_counted_as_pytorch_s_and_change_no_bit():
    x, weight, bias = drawn((2, 16, 24, 4, 4))
    expected = convolved(x, weight, bias)
    latent = x.clone().requires_grad_()
    (y, gradient), count = counted(
        lambda: ((y := convolved(latent, weight, bias)), torch.autograd.grad(y, latent, expected))
    )
    assert torch.equal(y, expected) and gradient[0].shape == x.shape
    assert count == 2 * (2 * expected.numel() * 9 * 16)
    with torch.inference_mode():
        (y, count), calls = by_winograd(lambda: counted(lambda: convolved(x, weight, bias)))
    assert calls == 1 and count == 2 * y.numel() * 9 * 16


def test_weights_that_train_are_differentiated():
    x, weight, bias = drawn((2, 16, 16, 4, 4))
    weight.requires_grad_()
    y, calls = by_winograd(lambda: convolved(x, weight, bias))
    assert calls == 0 and y.requires_grad
    with torch.no_grad():
        _, calls = by_winograd(lambda: convolved(x, weight, bias))
    assert calls == 1
