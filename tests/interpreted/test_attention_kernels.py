"""The Triton kernels of attention on the shapes of real networks, scaled down, and on odd lengths."""

import dataclasses
import functools

import pytest
import torch
from helpers import DTYPES, assert_all_same, assert_as_good_as_eager, assert_same, assert_within, seeded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from emd_fast import ops
from emd_fast.backends.triton import attention_launch, attention_tiles

triton = functools.partial(ops.attention, backend="triton")
# Tokens, keys, heads, head dim. ADM has 64 to 1024 tokens in heads of 64; Stable Diffusion 1.5 64 to 4096 in heads of
# 40, 80 and 160, each also with the 77 keys of a text.
NETWORKS = [
    (192, 192, 1, 64), (128, 128, 1, 64), (64, 64, 3, 64), (131, 131, 1, 40), (192, 77, 1, 40), (130, 130, 1, 80),
    (128, 77, 1, 80), (128, 128, 1, 160), (64, 77, 2, 160), (64, 64, 2, 160),
]  # fmt: skip
# One query, one key, primes, more keys than queries; every way to hold a row (attention_tiles.widths).
RESTS = [
    (1, 1, 1, 5), (1, 77, 2, 40), (67, 1, 1, 64), (13, 131, 2, 16), (127, 3, 1, 17), (2, 65, 1, 48), (66, 33, 1, 96),
    (31, 70, 1, 128), (65, 64, 1, 129), (64, 65, 1, 192), (37, 101, 1, 256),
]  # fmt: skip


def inputs(tokens, keys, heads, head_dim, dtype, seed=0, layout="packed", spread=1.0):
    """q, k, v and a cotangent for two samples: slices of a projection as networks make them, or apart."""
    g = seeded(seed)

    def projected(length, parts):
        x = torch.randn(2, length, parts, heads, head_dim, generator=g).to(dtype)
        return x if layout == "packed" else x.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)

    if tokens == keys:
        q, k, v = projected(tokens, 3).unbind(2)
    else:
        (q,), (k, v) = projected(tokens, 1).unbind(2), projected(keys, 2).unbind(2)
    cotangent = torch.randn(2, tokens, heads, head_dim, generator=g).to(dtype)
    return (spread * q if spread != 1 else q), k, v, cotangent


def results(run, tensors, wide=False):
    """The value and the three gradients."""
    *leaves, cotangent = (t.double() if wide else t for t in tensors)
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def eager(backend, scale=None):
    """PyTorch's, either as it comes on the CPU or by products in the dtype of the inputs, one after another."""

    def run(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)

    return run


@pytest.fixture
def products_in_the_dtype():  # without it the plain path widens bfloat16 to float32
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    yield
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def check(tensors, scale=None, compare=assert_as_good_as_eager):
    ours = results(functools.partial(triton, scale=scale), tensors)
    exact = results(eager(SDPBackend.MATH, scale), tensors, wide=True)
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        theirs = results(eager(backend, scale), tensors)
        for what, mine, right, its in zip(("y", "to q", "to k", "to v"), ours, exact, theirs, strict=True):
            assert mine.dtype == its.dtype
            compare(mine, right, its, what=f"{what} beside {backend.name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", NETWORKS + RESTS, ids=str)
def test_value_and_gradients_against_float64(shape, dtype, products_in_the_dtype):
    check(inputs(*shape, dtype, layout="packed" if shape[0] % 2 else "heads first"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.5, -0.3, 0.0])
def test_scales(dtype, scale, products_in_the_dtype):
    check(inputs(70, 77, 1, 40, dtype), scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [5.0, 30.0])
def test_sharp_weights(dtype, spread, products_in_the_dtype):
    check(inputs(64, 128, 1, 64, dtype, spread=spread))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_far_below_zero(dtype, products_in_the_dtype):
    """Keys beyond the last are read as 0 and have logits of 0, hundreds above all others: they must not count."""
    q, k, v, g = inputs(5, 70, 1, 64, dtype)
    check((5 * q.abs(), -5 * k.abs(), v, g))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype):
    q, k, v, g = inputs(3, 70, 1, 64, dtype)
    q, k = torch.full_like(q, 200.0), k.fill_(-200.0)
    k[:, 65] = 200.0
    y, to_q, to_k, to_v = results(triton, (q, k, v, g))
    assert_same(y, v[:, 65:66].expand_as(y).contiguous())
    # What is left of two sums of the same 64 products, in different orders, times a key or a query of 200.
    left = 64 * 2.0**-24 * (g.abs().max() * v.abs().max()) * 3 * 200 / 8
    for gradient in (to_q, to_k):
        assert_within(gradient, torch.zeros_like(gradient), left)
    assert not to_v[:, :65].any() and not to_v[:, 66:].any()


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_the_gradients_that_are_asked_for(needs, launched):
    tensors = inputs(70, 77, 2, 40, torch.bfloat16)
    whole = results(triton, tensors)
    launched.clear()
    *leaves, cotangent = tensors
    leaves = [t.detach().requires_grad_(bool(need)) for t, need in zip(leaves, needs, strict=True)]
    triton(*leaves).backward(cotangent)
    for leaf, need, right in zip(leaves, needs, whole[1:], strict=True):
        assert_same(leaf.grad, right) if need else None
        assert need or leaf.grad is None
    expected = ["attention_kernel"]
    expected += ["attention_delta_kernel"] if needs[0] or needs[1] else []
    expected += ["attention_to_queries_kernel"] if needs[0] else []
    expected += ["attention_to_keys_kernel"] if needs[1] or needs[2] else []
    assert launched == expected


@pytest.mark.parametrize("head_dim", [40, 160])
def test_gradients_to_k_and_v_together_or_apart_are_the_same(head_dim, monkeypatch):
    tensors = inputs(70, 77, 1, head_dim, torch.float16)
    found, pick = [], attention_launch.pick
    for apart in (False, True):
        chosen = lambda *args, apart=apart: dataclasses.replace(pick(*args), apart=apart)  # noqa: E731
        monkeypatch.setattr(attention_launch, "pick", chosen)
        found.append(results(triton, tensors))
    assert_all_same(*found)


def test_any_strides():
    g = seeded(1)
    wide = torch.randn(2, 33, 2, 2 * 40 + 1, generator=g)
    q = wide[..., 1:41]
    k = torch.randn(20, 2, 3, 41, generator=g)[..., :40].transpose(0, 1)[:, :, :2]
    v = torch.randn(1, 1, 2, 40, generator=g).expand(2, 20, 2, 40)
    check((q, k, v, torch.randn(2, 33, 2, 40, generator=g)))
    check((q, k, v, torch.ones(()).expand(2, 33, 2, 40)))


def test_the_same_in_every_batch():
    tensors = inputs(70, 77, 2, 40, torch.bfloat16)
    whole = results(triton, tensors)
    parts = [results(triton, [t[s] for t in tensors]) for s in (slice(0, 1), slice(1, 2))]
    assert_all_same(map(torch.cat, zip(*parts, strict=True)), whole)


def assert_whole_as_good_as_eager(mine, right, its, length, what):
    """RMS error at most twice that of eager PyTorch in the same dtypes, largest error at most four times.

    And twice sqrt(length) 2^-24: a kernel adds terms one after another, a BLAS in as many parts as there are lanes.
    """
    errors = [mine.double() - right, its.double() - right]
    allowed = 2 * length**0.5 * 2.0**-24
    for norm, factor in ((lambda x: x.square().mean().sqrt(), 2), (lambda x: x.abs().max(), 4)):
        ours, eagers, size = (float(norm(x)) for x in (*errors, right))
        assert ours <= factor * eagers + allowed * size, f"{what}: {ours:.3g}, eager {eagers:.3g}, size {size:.3g}"


HEAD_DIMS = [8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 112, 128, 144, 160, 192, 224, 256]
LENGTHS = [(64, 64), (128, 77), (200, 200), (1, 129), (191, 63)]


def lengths(head_dim):
    """Of two head dims that are held alike, one leaves a rest and one does not: every length with one of the two."""
    alike = [d for d in HEAD_DIMS if attention_tiles.widths(d) == attention_tiles.widths(head_dim)]
    return range(5) if len(alike) == 1 else (1, 2) if head_dim == alike[-1] else (0, 3, 4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_and_more_lengths(head_dim, dtype, products_in_the_dtype):
    for seed in lengths(head_dim):
        tokens, keys = LENGTHS[seed]
        if dtype == torch.float32 and tokens == 200:
            continue  # its tiles are 32 long at most: of the other lengths too both sides have whole ones and rests
        compare = functools.partial(assert_whole_as_good_as_eager, length=head_dim + max(tokens, keys))
        check(inputs(tokens, keys, 1, head_dim, dtype, seed), compare=compare)
