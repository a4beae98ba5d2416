import math

import pytest
import torch
from helpers import DTYPES, assert_as_good_as_eager, assert_within, dtypes, laid_out, seeded, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import group_norm, silu
from torch.utils._python_dispatch import TorchDispatchMode

from emd_fast import ops
from emd_fast.backends import reference

NAMES = ["weight", "bias", "add", "scale", "shift"]


def formula(x, num_groups, weight=None, bias=None, *, eps=1e-5, add=None, scale=None, shift=None, activation=None):
    """What eager PyTorch makes of the documentation, in the dtypes of its arguments."""
    places = (..., *[None] * (x.dim() - 2))
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # without one torch fails in the backward pass
    u = x if add is None else x + add[places].to(x.dtype)
    y = group_norm(u, num_groups, *(p if p is None else p.to(x.dtype) for p in (weight, bias)), eps)
    y = y if scale is None else y * (1 + scale[places].to(x.dtype))
    y = y if shift is None else y + shift[places].to(x.dtype)
    return silu(y) if activation else y


def by_hand(x, num_groups, weight=None, bias=None, *, eps=1e-5, add=None, scale=None, shift=None, activation=None):
    """The definition, in float64 and without torch's group_norm."""
    places = (..., *[None] * (x.dim() - 2))
    u = x if add is None else x + add[places]
    grouped = u.reshape(len(x), num_groups, math.prod(x.shape[1:]) // num_groups)
    centred = grouped - grouped.mean(2, keepdim=True)
    y = (centred / torch.sqrt((centred**2).mean(2, keepdim=True) + eps)).reshape(x.shape)
    y = y if weight is None else y * weight.reshape(1, -1, *[1] * (x.dim() - 2))
    y = y if bias is None else y + bias.reshape(1, -1, *[1] * (x.dim() - 2))
    y = y if scale is None else y * (1 + scale[places])
    y = y if shift is None else y + shift[places]
    return y * torch.sigmoid(y) if activation else y


def case(g, batch, groups, per_group, space, dtype, layout, with_names, of_vectors=torch.float32, offset=0.0):
    channels = groups * per_group
    x = laid_out((torch.randn(batch, channels, *space, generator=g) + offset).to(dtype), layout)
    sizes = {"weight": (channels,), "bias": (channels,)}
    vectors = {name: torch.randn(sizes.get(name, (batch, channels)), generator=g).to(of_vectors) for name in with_names}
    return x, vectors


def check(x, groups, vectors, activation, g, needs=None, eps=1e-5):
    """Forward and every gradient against float64."""
    needs = ["x", *vectors] if needs is None else needs
    cotangent = torch.randn(x.shape, generator=g).to(x.dtype)
    results = []
    # torch's own fails in the backward pass of an empty batch.
    eager = formula if x.numel() else by_hand
    for run, wide in ((ops.group_norm, False), (by_hand, True), (eager, False)):
        inputs = {"x": x, **vectors}
        inputs = {k: (v.double() if wide else v).detach() for k, v in inputs.items()}
        # Eager always to x too: torch 2.13 crashes in the backward pass of a channels_last group_norm otherwise.
        asked = dict.fromkeys([*needs, "x"]) if run is formula else needs
        leaves = [inputs[name].requires_grad_() for name in asked]
        y = run(inputs.pop("x"), groups, **inputs, activation=activation, eps=eps)
        grads = torch.autograd.grad(y, leaves, cotangent.to(y.dtype)) if needs else ()
        results.append([y.detach(), *grads[: len(needs)]])
    for what, mine, exact, its, like in zip(
        ["y", *needs], *results, [x, *({"x": x, **vectors}[name] for name in needs)], strict=True
    ):
        assert mine.dtype == like.dtype, what
        assert_as_good_as_eager(mine, exact, its, what=what)
    return results[0][0]


@given(
    batch=st.sampled_from([0, 1, 2, 3]),
    groups=st.sampled_from([1, 2, 3, 8]),
    per_group=st.sampled_from([1, 2, 3, 5]),
    space=st.sampled_from([(), (1,), (7,), (3, 5), (8, 8), (2, 3, 4)]),
    dtype=dtypes,
    of_vectors=dtypes,
    layout=st.sampled_from(["contiguous", "channels_last", "transposed", "sliced", "expanded", "batch_last"]),
    with_names=st.sets(st.sampled_from(NAMES)),
    activation=st.sampled_from([None, "silu"]),
    seed=seeds,
)
def test_value_and_gradients(
    backend, batch, groups, per_group, space, dtype, of_vectors, layout, with_names, activation, seed
):
    if per_group == 1 and space in ((), (1,)):
        space = (4,)  # one number to a group has no variance, and nothing but rounding to compare
    g = seeded(seed)
    x, vectors = case(g, batch, groups, per_group, space, dtype, layout, sorted(with_names), of_vectors)
    check(x, groups, vectors, activation, g)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(2, 32, 64, 16, 16), (1, 4, 12, 33, 31), (2, 1, 6, 64, 64)])
def test_real_sizes(backend, size, dtype, layout):
    batch, groups, channels, *space = size
    g = seeded(0)
    x, vectors = case(g, batch, groups, channels // groups, space, dtype, layout, NAMES, dtype)
    check(x, groups, vectors, "silu", g)


@pytest.mark.parametrize("offset", [30.0, 3000.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_large_mean_does_not_swallow_the_variance(backend, offset, layout):
    """E[x^2] - E[x]^2 would: at 3000 it has an error of the size of the variance."""
    g = seeded(1)
    x, _ = case(g, 2, 4, 4, (16, 16), torch.float32, layout, [], offset=offset)
    y = ops.group_norm(x, 4)
    exact, eager = by_hand(x.double(), 4), formula(x, 4)
    assert_as_good_as_eager(y, exact, eager)
    assert (y.double() - exact).abs().max() < 1e-6 * offset + 1e-5


@pytest.mark.parametrize("needs", [["x"], ["weight"], ["bias"], ["add"], ["scale"], ["shift"], ["x", "shift"], []])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_the_gradients_that_are_asked(backend, needs, layout):
    g = seeded(2)
    x, vectors = case(g, 2, 2, 3, (4, 5), torch.float32, layout, NAMES)
    asked = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.emd_fast.group_norm_backward.default:
                asked.append(list(args[-2]))
            return function(*args, **(kwargs or {}))

    with Record():
        check(x, 2, vectors, "silu", g, needs)
    order = ["x", "weight", "bias", "add", "scale", "shift"]
    assert asked == ([[name in needs for name in order]] if needs else [])


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "given_names", [NAMES, [], ["weight", "scale"], ["bias", "scale"], ["scale"], ["add", "shift"]]
)
def test_gradient_formulas_of_the_reference_in_float64(activation, given_names):
    g = seeded(3)
    x, vectors = case(g, 2, 2, 2, (3,), torch.float32, "contiguous", given_names)
    x, vectors = x.double().requires_grad_(), {k: v.double().requires_grad_() for k, v in vectors.items()}
    arguments = [vectors.get(name) for name in NAMES]

    def forward(x, *rest):
        weight, bias, add, scale, shift = rest
        return reference.OPS["group_norm"](x, 2, weight, bias, 1e-5, add, scale, shift, activation == "silu")

    assert torch.autograd.gradcheck(lambda *a: forward(*a)[0], (x, *arguments))
    y, mean, rstd = forward(x, *arguments)
    cotangent = torch.randn(y.shape, generator=g, dtype=torch.float64)
    fixed = [a if a is None else a.detach() for a in arguments]
    needs = [True, *(a is not None for a in arguments)]
    given = (cotangent, x.detach(), mean.detach(), rstd.detach(), 2, *fixed, activation == "silu", needs)
    mine = reference.OPS["group_norm_backward"](*given)
    leaves = [x, *(a for a in arguments if a is not None)]
    exact = torch.autograd.grad(y, leaves, cotangent)
    for ours, its in zip([m for m, n in zip(mine, needs, strict=True) if n], exact, strict=True):
        assert torch.allclose(ours, its, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_of_result_and_gradient(backend, dtype):
    for x, format in (
        (torch.randn(2, 4, 3, 5), torch.contiguous_format),
        (torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last), torch.channels_last),
        (torch.randn(2, 4, 2, 3, 5).contiguous(memory_format=torch.channels_last_3d), torch.channels_last_3d),
        (torch.randn(2, 4, 5, 3).transpose(2, 3), torch.contiguous_format),
    ):
        x = x.to(dtype).requires_grad_()
        y = ops.group_norm(x, 2)
        assert y.is_contiguous(memory_format=format)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert grad.is_contiguous(memory_format=format)


def test_cotangents_of_any_layout(backend):
    g = seeded(4)
    x = torch.randn(2, 4, 3, 5, generator=g, requires_grad=True)
    cotangent = torch.randn(2, 4, 3, 5, generator=g)
    y = ops.group_norm(x, 2, activation="silu")
    (expected,) = torch.autograd.grad(y, x, cotangent, retain_graph=True)
    for layout in ("channels_last", "transposed", "sliced", "batch_last"):
        (grad,) = torch.autograd.grad(y, x, laid_out(cotangent, layout), retain_graph=True)
        assert_within(grad, expected, 1e-6, layout)
    (grad,) = torch.autograd.grad(y.sum(), x)  # a cotangent of strides 0
    assert_within(grad, torch.autograd.grad(formula(x, 2, activation="silu").sum(), x)[0], 1e-5)


def test_constant_input(backend):
    x = torch.full((2, 4, 5), 7.0, requires_grad=True)
    y = ops.group_norm(x, 2, bias=torch.full((4,), 3.0))
    assert bool((y == 3).all())
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (0, 4), (2, 4, 3, 0)])
def test_empty(backend, shape, recwarn):
    x = torch.empty(shape, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    y = ops.group_norm(x, 2, weight)
    y.sum().backward()
    assert y.shape == shape and x.grad.shape == shape and not weight.grad.any() and weight.grad.shape == (4,)
    assert not recwarn.list


def test_in_place_change_of_what_backward_needs_is_noticed(backend):
    x = torch.randn(2, 4, 3, requires_grad=True)
    scale = torch.zeros(2, 4)
    y = ops.group_norm(x, 2, scale=scale)
    scale.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()
