"""residual: the end of a residual block, against float64."""

import conftest
import pytest
import torch
from helpers import LAYOUTS, assert_as_good_as_eager, assert_same, draw, dtypes, layouts, seeded, seeds
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import doubled

import emd_fast
from emd_fast import ops
from emd_fast.backends.reference.group_norm import layout as layout_of

# No compiled kernel has this op.
chosen = pytest.mark.parametrize("chosen", ["triton"] if conftest.INTERPRETED else ["reference", "auto"])
sizes = st.sampled_from([1, 2, 3, 5, 8, 13, 16])
shapes = st.tuples(st.sampled_from([0, 1, 2, 3]), sizes, st.lists(sizes, max_size=3)).map(lambda s: (s[0], s[1], *s[2]))
images = st.sampled_from([*LAYOUTS, "channels_last", "channels_last"])
scales = st.sampled_from([1.0, 0.5**0.5, -3.0, 0.0])
maybe = st.one_of(st.none(), dtypes)


def formula(x, skip, bias, skip_bias, scale):
    total = x + skip
    for values in (bias, skip_bias):
        if values is not None:
            total = total + values.reshape(-1, *[1] * (x.dim() - 2))
    return (total * scale).to(torch.promote_types(x.dtype, skip.dtype))


def tensors(shape, g, of_x, of_skip, of_bias, of_skip_bias, layout, other):
    vectors = [None if dtype is None else draw(shape[1:2], g, dtype, scale=2) for dtype in (of_bias, of_skip_bias)]
    return draw(shape, g, of_x, layout), draw(shape, g, of_skip, other), *vectors


@chosen
@given(shapes, dtypes, dtypes, maybe, maybe, images, images, scales, seeds)
def test_against_float64(chosen, shape, of_x, of_skip, of_bias, of_skip_bias, layout, other, scale, seed):
    given = tensors(shape, seeded(seed), of_x, of_skip, of_bias, of_skip_bias, layout, other)
    with emd_fast.use_backend(chosen):
        out = ops.residual(*given, scale=scale)
    assert out.dtype == torch.promote_types(of_x, of_skip)
    assert_as_good_as_eager(out, formula(*map(doubled, given), scale), formula(*given, scale))
    assert out.is_contiguous(memory_format=layout_of(given[0]))


@chosen
@given(shapes, dtypes, dtypes, maybe, maybe, layouts, scales, st.integers(1, 15), seeds)
def test_gradients(chosen, shape, of_x, of_skip, of_bias, of_skip_bias, layout, scale, asked, seed):
    """Of each subset of the tensors; a network with frozen weights asks for x and skip alone."""
    g = seeded(seed)
    given = tensors(shape, g, of_x, of_skip, of_bias, of_skip_bias, layout, layout)
    cotangent = draw(shape, g, torch.promote_types(of_x, of_skip), layout)
    wanted = [i for i, t in enumerate(given) if t is not None and asked >> i & 1]
    results = []
    for convert, run in ((doubled, formula), (lambda t: t, formula), (lambda t: t, ops.residual)):
        inputs = [None if t is None else convert(t).detach().requires_grad_(i in wanted) for i, t in enumerate(given)]
        with emd_fast.use_backend(chosen):
            out = run(*inputs, scale) if run is formula else run(*inputs, scale=scale)
        if not wanted:
            assert not out.requires_grad
            return
        results.append(torch.autograd.grad(out, [inputs[i] for i in wanted], convert(cotangent)))
    for i, exact, eager, mine in zip(wanted, *results, strict=True):
        assert mine.dtype == given[i].dtype
        assert_as_good_as_eager(mine, exact, eager, what=f"gradient {i}")


@chosen
def test_a_sum_does_not_depend_on_its_batch_and_what_cancels_is_zero(chosen):
    g = seeded(0)
    x = draw((5, 6, 7, 3), g, torch.bfloat16, "channels_last")
    bias = draw((6,), g)
    with emd_fast.use_backend(chosen):
        whole = ops.residual(x, 2 * x, bias, scale=0.7)
        assert_same(torch.cat([ops.residual(x[i : i + 1], 2 * x[i : i + 1], bias, scale=0.7) for i in range(5)]), whole)
        assert not ops.residual(x, -x, bias, -bias).any()
        assert ops.residual(x, torch.zeros_like(x)).data_ptr() != x.data_ptr()


def test_second_derivatives():
    x, skip, bias = (torch.randn(size, requires_grad=True) for size in ((2, 3, 4), (2, 3, 4), (3,)))
    (first,) = torch.autograd.grad((ops.residual(x, skip, bias, scale=2.0) ** 3).sum(), bias, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.allclose(second, 48 * (x + skip + bias[:, None]), rtol=1e-5)


@pytest.mark.parametrize("channels_last", [True, False])
def test_one_launch_and_no_copy(channels_last, request):
    if not conftest.INTERPRETED:
        pytest.skip("only of Triton")
    launched = request.getfixturevalue("launched")
    x = draw((2, 8, 4, 4), seeded(0), torch.bfloat16, "channels_last" if channels_last else "contiguous")
    with emd_fast.use_backend("triton"):
        ops.residual(x, x, torch.ones(8), torch.ones(8), scale=2.0)
        ops.residual(x[:0], x[:0])
    assert launched == ["residual_kernel"]
