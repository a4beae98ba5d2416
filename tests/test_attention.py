import itertools
import math
import sys
import types
import warnings

import conftest
import pytest
import torch
from helpers import DTYPES, assert_as_good_as_eager, assert_same, dtypes, seeded, seeds
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

import emd_fast
from emd_fast import backends, ops
from emd_fast.backends import attention_table, cudnn, xformers
from emd_fast.backends.attention_table import Row

BACKENDS = ["triton"] if conftest.INTERPRETED else [None, "sdpa", "reference"]


def by_hand(q, k, v, scale=None):
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return torch.einsum("bhqk,bkhd->bqhd", (scale * torch.einsum("bqhd,bkhd->bhqk", q, k)).softmax(3), v)


def eager(q, k, v, scale=None):
    return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale).transpose(1, 2)


def check(q, k, v, scale, backend, g):
    cotangent = torch.randn(q.shape, generator=g).to(q.dtype)
    results, ours = [], lambda *a: ops.attention(*a[:3], scale=scale, backend=backend)
    for run in (ours, by_hand, eager):
        leaves = [(t.double() if run is by_hand else t).detach().requires_grad_() for t in (q, k, v)]
        y = run(*leaves, scale)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, cotangent.to(y.dtype))])
    assert results[0][0].dtype == q.dtype
    # Kernel and eager round an operand of each product to 16 bits. In a tensor of a few values, eager's
    # roundings may cancel by luck, so one rounding of the largest value is allowed besides.
    rounding = 0.0 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps / 2
    for what, mine, exact, its in zip(["y", "q", "k", "v"], *results, strict=True):
        assert_as_good_as_eager(mine, exact, its, more=rounding * float(exact.abs().max()), what=what)


@given(
    batch=st.sampled_from([1, 2, 3]),
    tokens=st.sampled_from([1, 2, 7, 16]),
    keys=st.sampled_from([1, 3, 16, 33]),
    heads=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([1, 2, 8, 13, 40, 256]),
    dtype=dtypes,
    scale=st.sampled_from([None, 0.1, 1.0]),
    keys_lie=st.sampled_from(["apart", "as slices of one projection", "once for all samples"]),
    seed=seeds,
)
@pytest.mark.parametrize("chosen", BACKENDS)
def test_value_and_gradients(chosen, batch, tokens, keys, heads, head_dim, dtype, scale, keys_lie, seed):
    g = seeded(seed)
    q = torch.randn(batch, heads, tokens, head_dim, generator=g).to(dtype).transpose(1, 2)
    if keys_lie == "as slices of one projection":
        k, v = torch.randn(batch, keys, heads, 2, head_dim, generator=g).to(dtype).unbind(3)
    else:
        k, v = (torch.randn(batch, keys, heads, head_dim, generator=g).to(dtype) for _ in range(2))
    if keys_lie == "once for all samples":
        k = k[:1].expand(k.shape)
    check(q, k, v, scale, chosen, g)


@pytest.mark.parametrize("chosen", BACKENDS)
def test_large_logits_do_not_overflow(chosen):
    q = torch.full((1, 2, 1, 4), 100.0)
    k = torch.tensor([100.0, 99.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 4).contiguous()
    v = torch.arange(8.0).reshape(1, 2, 1, 4)
    assert torch.equal(ops.attention(q, k, v, backend=chosen), v[:, :1].expand(1, 2, 1, 4))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize(("batch", "tokens", "keys"), [(2, 0, 3), (2, 0, 0), (2, 3, 0), (0, 4, 4)])
def test_no_queries_or_no_keys_or_no_samples(chosen, dtype, batch, tokens, keys):
    q = torch.ones(batch, tokens, 2, 8, dtype=dtype, requires_grad=True)
    k = torch.ones(batch, keys, 2, 8, dtype=dtype, requires_grad=True)
    y = ops.attention(q, k, k, backend=chosen)
    assert y.shape == q.shape and y.dtype == dtype and not y.any()
    for gradient, leaf in zip(torch.autograd.grad(y.sum(), (q, k)), (q, k), strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("triton", "CPU tensors need TRITON_INTERPRET=1"),
        ("xformers", "it serves cuda tensors only"),
        ("cudnn", "it serves cuda tensors only"),
    ],
)
def test_a_named_backend_wins_over_the_block_and_raises_with_the_reason_if_it_cannot_run(name, reason):
    q = torch.randn(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match=f"'{name}' cannot run attention on cpu tensors: {reason}"):
        ops.attention(q, q, q, backend=name)
    with emd_fast.use_backend("cuda"):
        ops.attention(q, q, q, backend="sdpa")


@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_backward_computes_only_what_is_asked_for(needs, monkeypatch):
    asked, implementation = [], backends.implementation
    monkeypatch.setattr(backends, "implementation", lambda op, *rest: asked.append(op) or implementation(op, *rest))
    leaves = [torch.randn(2, 3, 2, 8, generator=seeded(i)) for i in range(3)]
    whole = [t.clone().requires_grad_() for t in leaves]
    ops.attention(*whole, backend="reference").square().sum().backward()
    some = [t.clone().requires_grad_(bool(need)) for t, need in zip(leaves, needs, strict=True)]
    ops.attention(*some, backend="reference").square().sum().backward()
    for one, all_of_them, need in zip(some, whole, needs, strict=True):
        assert (one.grad is not None) == bool(need)
        assert not need or torch.equal(one.grad, all_of_them.grad)
    assert asked == ["attention", "attention_backward"] * 2
    q, k, v = leaves
    forward, backward = (implementation(op, "reference", "cpu") for op in ("attention", "attention_backward"))
    found = backward(q, q, k, v, *forward(q, k, v, 0.3), 0.3, [bool(n) for n in needs])
    assert [bool(t.numel()) for t in found] == [bool(n) for n in needs]


@pytest.mark.parametrize("chosen", BACKENDS[-1:])
def test_top_and_share_give_the_weights(chosen):
    g = seeded(0)
    q, k, v = torch.randn(2, 5, 3, 8, generator=g), *torch.randn(2, 2, 7, 3, 8, generator=g)
    _, top, share = backends.implementation("attention", chosen, "cpu")(q, k, v, 0.3)
    logits = 0.3 * math.log2(math.e) * torch.einsum("bqhd,bkhd->bhqk", q, k)
    weights = share[..., None] * torch.exp2(logits - top[..., None])
    torch.testing.assert_close(weights, logits.mul(math.log(2)).softmax(-1))


CALL = {"head_dim": 40, "dtype": torch.bfloat16, "tokens": 4096, "keys": 77, "gradient": True}


@pytest.fixture
def table(monkeypatch):
    """Rows in place of the shipped table, on a GPU of this architecture."""

    def replace(*rows, architecture=90):
        monkeypatch.setattr(attention_table, "TABLE", rows)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: divmod(architecture, 10))
        backends._warn_once_about_attention.cache_clear()

    return replace


def test_the_shipped_table():
    for architecture in (80, 86, 89, 100, 120):
        assert attention_table.choose(architecture, **CALL) == "sdpa"
    for dtype, head_dim in itertools.product((torch.bfloat16, torch.float16), (40, 64, 80, 160)):
        for gradient, keys in itertools.product((False, True), (77, 4096, 64)):
            chosen = attention_table.choose(90, head_dim, dtype, 4096, keys, gradient)
            assert chosen == ("sdpa" if head_dim == 160 and gradient else "cudnn")
    for other in ({"dtype": torch.float32}, {"head_dim": 72}, {"keys": 1}, {"keys": 0}):
        assert attention_table.choose(90, **CALL | other) == "sdpa"
    assert attention_table.backends(80) == ["sdpa"] and attention_table.backends(90) == ["cudnn", "sdpa"]


def test_the_shipped_table_serves_the_shapes_of_the_benchmarks():
    from benchmarks.attention import ADM, SD15

    for _, tokens, _, head_dim, *keys in ADM + SD15:
        row = attention_table.choose(90, head_dim, torch.bfloat16, tokens, keys[0] if keys else tokens, True)
        assert row == ("sdpa" if head_dim == 160 else "cudnn")


@pytest.fixture
def cudnn_here(monkeypatch):
    """cuDNN on the CPU: the same call by PyTorch's attention. Yields what was asked of the op."""
    asked = []

    def op(q, k, v, bias, log_sum_exp, *, scale):
        asked.append((bias, log_sum_exp, scale))
        return scaled_dot_product_attention(q, k, v, scale=scale), None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", op)
    monkeypatch.setattr(cudnn, "why_not", lambda device_type: None)
    return asked


def test_cudnn_computes_the_same_and_saves_for_the_backward_pass_where_there_is_one(cudnn_here):
    q, k, v = (torch.randn(2, n, 3, 8, generator=seeded(n)).bfloat16() for n in (5, 7, 7))
    expected = ops.attention(q, k, v, scale=0.3, backend="sdpa")
    assert torch.equal(ops.attention(q, k, v, scale=0.3, backend="cudnn"), expected)
    ops.attention(q, k, v.clone().requires_grad_(), backend="cudnn")
    with torch.no_grad():
        ops.attention(q, k, v.clone().requires_grad_(), backend="cudnn")
    assert cudnn_here == [(None, False, 0.3), (None, True, 1 / math.sqrt(8)), (None, False, 1 / math.sqrt(8))]
    for sizes in ((0, 5, 7), (2, 0, 7), (2, 5, 0)):  # cuDNN takes no empty tensors
        empty = (torch.ones(sizes[0], n, 3, 8).bfloat16() for n in (sizes[1], sizes[2], sizes[2]))
        assert not ops.attention(*empty, backend="cudnn").any()
    assert len(cudnn_here) == 3


@pytest.mark.parametrize(
    ("dtype", "head_dim", "keys", "reason"),
    [
        (torch.float32, 8, 3, "it takes bfloat16 and float16"),
        (torch.bfloat16, 12, 3, "the head dim is no multiple of 8"),
        (torch.bfloat16, 8, 1, "it has no kernel for one key"),
    ],
)
def test_what_cudnn_has_no_kernel_for(cudnn_here, dtype, head_dim, keys, reason):
    q, k = (torch.ones(1, n, 2, head_dim, dtype=dtype) for n in (3, keys))
    with pytest.raises(RuntimeError, match=rf"'cudnn' cannot run attention on .* {dtype}: {reason}"):
        ops.attention(q, k, k, backend="cudnn")
    assert not cudnn_here


def test_why_cudnn_cannot_serve(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    for version, reason in ((91900, None), (8907, "it needs cuDNN 9, and PyTorch has 8907")):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        assert cudnn.why_not("cuda") == reason
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    assert cudnn.why_not("cpu") == "it serves cuda tensors only"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert "use_deterministic_algorithms" in cudnn.why_not("cuda")
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert "enable_cudnn_sdp(False)" in cudnn.why_not("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert cudnn.why_not("cuda") == "it needs cuDNN 9, and PyTorch has none"


def test_the_op_of_cudnn_is_there_with_a_derivative():
    """On the meta device, where PyTorch checks the arguments and computes nothing."""
    shape = torch.Size((2, 16, 3, 40))
    q, k, v = (torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    y = cudnn.attention(q, k, v, 0.3)
    assert y.shape == shape and y.dtype == torch.bfloat16
    assert [g.shape for g in torch.autograd.grad(y, (q, k, v), torch.empty_like(y))] == [shape] * 3
    with FlopCounterMode(display=False) as counter:
        cudnn.attention(q, k, v, 0.3)
    assert counter.get_total_flops() == 2 * 2 * 2 * 3 * 16 * 16 * 40


@pytest.mark.parametrize(
    ("fits", "does_not"),
    [
        ({}, {"architectures": (80,)}),
        ({"architectures": (80, 90)}, {"head_dims": (64,)}),
        ({"head_dims": (40, 80)}, {"dtypes": (torch.float32, torch.float16)}),
        ({"dtypes": (torch.bfloat16,)}, {"tokens": (0, 4095)}),
        ({"tokens": (1024, 4096)}, {"keys": (78, 4096)}),
        ({"keys": (77, 77)}, {"gradient": False}),
        ({"gradient": True}, {"head_dims": (1,)}),
    ],
)
def test_the_first_row_that_fits(fits, does_not, table):
    table(Row("xformers", **does_not), Row("triton", **fits), Row("reference"))
    assert attention_table.choose(90, **CALL) == "triton"
    table(Row("triton", **does_not), Row("reference"))
    assert attention_table.choose(90, **CALL) == "reference"


def test_a_row_whose_backend_cannot_run_falls_back_and_says_so_once(table, monkeypatch):
    table(Row("xformers"))
    monkeypatch.setattr(xformers, "_ops", lambda: (None, "xFormers is not installed"))
    with pytest.warns(RuntimeWarning, match="sdpa and not by xformers .xFormers is not installed"):
        assert backends.for_attention(torch.device("cuda"), *CALL.values()) == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in ("cuda", "cpu"):
            assert backends.for_attention(torch.device(device), *CALL.values()) == "sdpa"


def test_the_table_in_compiled_code(table):
    table(Row("reference", (90,), (8,), tokens=(0, 16)), Row("sdpa"))
    seen = []

    def run(q):
        backend = backends.for_attention(torch.device("cuda"), q.shape[3], q.dtype, q.shape[1], q.shape[1], False)
        return ops.attention(q, q, q, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend=lambda graph, _: seen.append(graph) or graph, dynamic=True)
    for tokens in (9, 16, 17, 30, 10):  # not 8, which would be the head dim too
        q = torch.randn(2, tokens, 2, 8, generator=seeded(tokens))
        assert_same(compiled(q), run(q))
    assert len(seen) == 2


def test_report(table, monkeypatch):
    table(Row("triton", (90,)), Row("xformers", (80,)), Row("sdpa"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    row = emd_fast.backend_report()["attention"]["cuda"]
    assert row["backend"] == "triton or sdpa" and "triton" not in row["reason"] and "cudnn: " in row["reason"]


@pytest.fixture
def pretended(monkeypatch):
    def install(**members):
        for name in ("xformers", "xformers.ops"):
            module = types.SimpleNamespace(__spec__=types.SimpleNamespace(name="xformers"), __name__=name, **members)
            monkeypatch.setitem(sys.modules, name, module)
        xformers._ops.cache_clear()

    yield install
    xformers._ops.cache_clear()


def test_xformers_is_called_as_its_documentation_has_it_or_says_why_not(pretended, monkeypatch):
    pretended(memory_efficient_attention=lambda q, k, v, scale: scale * q)
    q = torch.ones(1, 2, 3, 4)
    assert xformers.why_not("cuda") is None and torch.equal(xformers.attention(q, q, q, 0.5), q / 2)

    def refuse(q, k, v, scale):
        raise NotImplementedError("No operator found\nfor head_dim 3")

    pretended(memory_efficient_attention=refuse)
    with pytest.raises(RuntimeError, match=r"xformers.*No operator found for head_dim 3"):
        xformers.attention(*[torch.ones(1, 2, 3, 3)] * 3, 0.5)
    pretended()
    assert xformers.why_not("cuda") == "this xFormers has no memory_efficient_attention"
    monkeypatch.setitem(sys.modules, "xformers.ops", None)  # its import fails
    xformers._ops.cache_clear()
    assert xformers.why_not("cuda").startswith("xFormers does not import: ")
