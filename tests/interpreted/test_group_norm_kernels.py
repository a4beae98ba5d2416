"""The Triton kernels of group_norm at the channel counts of real networks."""

import pytest
import torch
from helpers import DTYPES, assert_same, draw, laid_out, seeded
from test_group_norm import NAMES, case, check

import emd_fast
from emd_fast import ops
from emd_fast.backends import triton
from emd_fast.backends.triton import groups

# Of the ADM network for ImageNet-64 and of Stable Diffusion 1.5, with 32 groups.
ADM = [192, 384, 576, 768, 960, 1152, 1344, 1536]
SD = [320, 640, 960, 1280, 1920, 2560]
CHANNELS = sorted({*ADM, *SD})
# How many tensors go with x, and what follows the norm: as ADM, as Stable Diffusion, everything, nothing.
USES = [["weight", "bias", "scale", "shift"], ["weight", "bias", "add"], NAMES, []]


@pytest.fixture
def streamed(monkeypatch):  # no block is kept, as otherwise of large images
    monkeypatch.setattr(groups, "_RESIDENT", 0)
    monkeypatch.setattr(groups, "_STREAMED", 512)
    groups.pick.cache_clear()
    yield
    groups.pick.cache_clear()


def run_case(g, channels, space, dtype, layout, names, batch=2, num_groups=32, **more):
    x, vectors = case(g, batch, num_groups, channels // num_groups, space, dtype, layout, names, **more)
    with emd_fast.use_backend("triton"):
        check(x, num_groups, vectors, "silu" if len(names) != 3 else None, g)


@pytest.mark.parametrize("channels", CHANNELS)
def test_every_channel_count(channels):
    i = CHANNELS.index(channels)
    for k, layout in enumerate(["channels_last", "contiguous"]):
        dtype, names = DTYPES[(i + k) % 3], USES[(i + 2 * k) % 4]
        run_case(seeded(i), channels, (4, 5), dtype, layout, names, batch=1, of_vectors=dtype)


@pytest.mark.parametrize("channels", [192, 320])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_every_channel_count_in_chunks(channels, layout, streamed, monkeypatch):
    names, dtype = (NAMES, torch.bfloat16) if channels == 320 else (USES[channels == 192], torch.float32)
    # Several steps, several chunks, the last of both in part.
    monkeypatch.setattr(groups, "_STREAMED", 512 if layout == "channels_last" else 64)
    plan = groups.pick(channels, channels // 32, 20, layout == "channels_last", 1)
    assert plan.chunks > 1 and plan.steps > 1
    run_case(seeded(channels), channels, (4, 5), dtype, layout, names, batch=1, of_vectors=dtype)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(
    "shape", [(1, 6, 3, 1, 1), (2, 6, 3, 5, 7), (3, 24, 4, 7, 1), (1, 8, 8, 3, 3), (2, 40, 1, 2, 1)]
)
def test_odd_shapes_in_chunks(shape, layout, streamed, monkeypatch):
    monkeypatch.setattr(groups, "_STREAMED", 32)
    batch, channels, num_groups, *space = shape
    if (channels // num_groups, *space) == (2, 1, 1):
        space = [2, 1]  # two numbers to a group are +1 and -1, whatever they are
    run_case(seeded(5), channels, space, torch.float32, layout, NAMES, batch, num_groups)


def test_a_sample_of_more_than_32_bits(monkeypatch):
    monkeypatch.setattr(groups, "_INT32", 0)
    groups.pick.cache_clear()
    assert groups.pick(24, 6, 35, True, 1).wide
    for layout in ("channels_last", "contiguous"):
        run_case(seeded(6), 24, (5, 7), torch.float32, layout, NAMES, 2, 4)
    groups.pick.cache_clear()


@pytest.fixture(params=[False, True])
def in_chunks(request):
    return request.param and not request.getfixturevalue("streamed")


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_mean_of_1000_and_a_deviation_of_1(layout, in_chunks, launched):
    """With E[x^2] - E[x]^2 the variance would be lost in float32: 10^6 has a spacing of 0.06."""
    g = seeded(7)
    x = laid_out(1000 + torch.randn(2, 24, 16, 16, generator=g), layout)
    add = torch.full((2, 24), 1000.0)
    _, mean, rstd = triton.implementation("group_norm")(x, 4, None, None, 1e-5, None, None, None, False)
    assert launched == (["group_moments_kernel", "group_norm_apply_kernel"] if in_chunks else ["group_norm_kernel"])
    with emd_fast.use_backend("triton"):
        check(x, 4, {}, None, g)
        check(x, 4, {"add": add}, None, g)
    exact = x.double().reshape(2, 4, -1)
    assert (mean - exact.mean(2)).abs().max() < 2e-4
    assert (rstd * (exact.var(2, correction=0) + 1e-5).sqrt() - 1).abs().max() < 1e-5


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_sample_is_the_same_in_every_batch(layout, in_chunks):
    g, needs = seeded(8), [True, False, False, True, True, True]
    x, grad = (draw((4, 24, 9, 9), g, torch.bfloat16, layout) for _ in range(2))
    weight, bias = (torch.randn(24, generator=g) for _ in range(2))
    add, scale, shift = (torch.randn(4, 24, generator=g) for _ in range(3))
    forward, backward = triton.implementation("group_norm"), triton.implementation("group_norm_backward")

    def run(s):
        rows = (add[s], scale[s], shift[s])
        y, mean, rstd = forward(x[s], 4, weight, bias, 1e-5, *rows, True)
        return y, mean, rstd, *backward(grad[s], x[s], mean, rstd, 4, weight, bias, *rows, True, needs)

    whole = run(slice(None))
    for s in (slice(0, 1), slice(1, 4), slice(2, 3)):
        for mine, all_of_them, i in zip(run(s), whole, range(9), strict=True):
            if all_of_them.numel():
                assert_same(mine, all_of_them[s], f"result {i}")


def test_only_what_is_asked_is_launched(in_chunks, launched, monkeypatch):
    if in_chunks:
        monkeypatch.setattr(groups, "_STREAMED", 32)
    g, v = seeded(9), torch.ones(2, 6)
    x = draw((2, 6, 5, 7), g)
    mean, rstd, w = torch.zeros(2, 2), torch.ones(2, 2), torch.ones(6)
    backward = triton.implementation("group_norm_backward")
    sums = ["group_norm_backward_sums_kernel"]
    main = [*sums, "group_norm_backward_apply_kernel"] if in_chunks else ["group_norm_backward_kernel"]
    vectors, parameters = ["group_norm_vectors_kernel"], ["group_norm_parameters_kernel"]
    for needed, expected in {
        (): [],
        (0,): main,
        (1,): sums + parameters,
        (3,): sums + vectors,
        (0, 4): main + vectors,
        (0, 1, 2, 3, 4, 5): main + vectors + parameters,
    }.items():
        needs = [i in needed for i in range(6)]
        launched.clear()
        found = backward(x, x, mean, rstd, 2, w, w, v, v, v, True, needs)
        assert launched == expected and [bool(t.numel()) for t in found] == needs


def test_vectors_of_any_strides():
    g = seeded(10)
    x = draw((3, 12, 4, 4), g)
    both = torch.randn(3, 24, generator=g)  # as the halves of a linear layer's output come
    scale, shift = both.chunk(2, dim=1)
    add, weight = torch.randn(12, 3, generator=g).T, torch.randn(24, generator=g)[::2]
    with emd_fast.use_backend("triton"):
        y = ops.group_norm(x, 4, weight, add=add, scale=scale, shift=shift)
        dense = [t.contiguous() for t in (weight, add, scale, shift)]
        assert_same(y, ops.group_norm(x, 4, dense[0], add=dense[1], scale=dense[2], shift=dense[3]))
