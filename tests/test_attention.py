import math

import pytest
import torch
from helpers import DTYPES, assert_as_good_as_eager, dtypes, naming, seeded, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import emd_fast
from emd_fast import ops

BACKENDS = [None, "sdpa", "reference"]


def by_hand(q, k, v, scale=None):
    """float64, one head at a time."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    heads = []
    for h in range(q.shape[2]):
        logits = scale * q[:, :, h] @ k[:, :, h].transpose(1, 2)
        heads.append(torch.softmax(logits, dim=-1) @ v[:, :, h])
    return torch.stack(heads, dim=2)


def eager(q, k, v, scale=None):
    return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)


def check(q, k, v, scale, backend, g):
    cotangent = torch.randn(q.shape, generator=g).to(q.dtype)
    results = []
    for run, wide in (
        (lambda *a: ops.attention(*a[:3], scale=scale, backend=backend), False),
        (by_hand, True),
        (eager, False),
    ):
        leaves = [(t.double() if wide else t).detach().requires_grad_() for t in (q, k, v)]
        y = run(*leaves, scale)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))])
    assert results[0][0].dtype == q.dtype
    for what, mine, exact, its in zip(["y", "q", "k", "v"], *results, strict=True):
        assert_as_good_as_eager(mine, exact, its, what=what)


@given(
    batch=st.sampled_from([1, 2, 3]),
    tokens=st.sampled_from([1, 2, 7, 16]),
    keys=st.sampled_from([1, 3, 16, 33]),
    heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([1, 2, 8, 13, 40, 256]),
    dtype=dtypes,
    scale=st.sampled_from([None, 0.1, 1.0]),
    interleaved=st.booleans(),
    seed=seeds,
)
@pytest.mark.parametrize("chosen", BACKENDS)
def test_value_and_gradients(chosen, batch, tokens, keys, heads, head_dim, dtype, scale, interleaved, seed):
    g = seeded(seed)
    q = torch.randn(batch, heads, tokens, head_dim, generator=g).to(dtype).transpose(1, 2)
    if interleaved:  # k and v as slices of one projection
        k, v = torch.randn(batch, keys, heads, 2, head_dim, generator=g).to(dtype).unbind(3)
    else:
        k, v = (torch.randn(batch, keys, heads, head_dim, generator=g).to(dtype) for _ in range(2))
    check(q, k, v, scale, chosen, g)


@pytest.mark.parametrize("chosen", BACKENDS)
def test_large_logits_do_not_overflow(chosen):
    q = torch.full((1, 2, 1, 4), 100.0)
    k = torch.tensor([100.0, 99.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 4).contiguous()
    v = torch.arange(8.0).reshape(1, 2, 1, 4)
    assert torch.equal(ops.attention(q, k, v, backend=chosen), v[:, :1].expand(1, 2, 1, 4))


def test_expanded_keys():
    g = seeded(0)
    q, k = torch.randn(3, 5, 2, 8, generator=g), torch.randn(1, 7, 2, 8, generator=g).expand(3, 7, 2, 8)
    check(q, k, k, None, None, g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", BACKENDS)
def test_empty_batch(chosen, dtype):
    q = torch.empty(0, 4, 2, 8, dtype=dtype)
    assert ops.attention(q, q, q, backend=chosen).shape == q.shape


def test_use_backend_reference_is_followed():
    q = torch.randn(2, 3, 2, 8)
    with emd_fast.use_backend("reference"):
        assert torch.equal(ops.attention(q, q, q), ops.attention(q, q, q, backend="reference"))


def test_an_explicit_backend_wins_over_the_block():
    q = torch.randn(2, 3, 2, 8)
    with emd_fast.use_backend("cuda"):
        ops.attention(q, q, q, backend="sdpa")


@pytest.mark.parametrize("chosen", ["triton", "xformers"])
def test_a_named_backend_that_cannot_run_raises(chosen):
    q = torch.randn(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match=chosen):
        ops.attention(q, q, q, backend=chosen)


Q = torch.ones(2, 3, 2, 8)
BAD = [
    ({"q": Q.double()}, TypeError, "q"),
    ({"q": Q[0]}, ValueError, "q"),
    ({"q": None}, TypeError, "q"),
    ({"q": torch.ones(2, 3, 2, 257)}, ValueError, "head_dim"),
    ({"q": torch.ones(2, 3, 8, 2).transpose(2, 3)}, ValueError, "q.*unit stride"),
    ({"k": torch.ones(2, 3, 2, 4)}, ValueError, "k"),
    ({"k": torch.ones(3, 3, 2, 8)}, ValueError, "k"),
    ({"k": torch.ones(2, 3, 16)}, ValueError, "k"),
    ({"k": None}, TypeError, "k"),
    ({"k": Q.half()}, TypeError, "k"),
    ({"k": Q.to("meta")}, ValueError, "k"),
    ({"v": torch.ones(2, 4, 2, 8)}, ValueError, "v"),
    ({"v": Q.bfloat16()}, TypeError, "v"),
    ({"v": torch.ones(2, 3, 8, 2).transpose(2, 3)}, ValueError, "v.*unit stride"),
    ({"backend": "cpu"}, ValueError, "backend"),
    ({"scale": float("nan")}, ValueError, "scale"),
    ({"scale": "1"}, TypeError, "scale"),
]


@pytest.mark.parametrize(("changed", "error", "named"), BAD)
def test_bad_input(changed, error, named):
    given = {"q": Q, "k": Q, "v": Q, **changed}
    with pytest.raises(error, match=naming(named)):
        ops.attention(given.pop("q"), given.pop("k"), given.pop("v"), **given)
