"""What autograd keeps of frozen networks."""

import copy

import pytest
import torch
from helpers import FlopCount, assert_all_same
from networks import make, output
from test_fuse import relative
from test_fuse_weight_cache import BF16, frozen
from torch import nn

import emd_fast
from emd_fast.backends import native
from emd_fast.fusion import geglu, layer_norm
from emd_fast.ops.convolution import convolution
from emd_fast.ops.layers import attention
from emd_fast.teachers.edm_networks import DhariwalUNet
from emd_fast.teachers.edm_networks.arguments import DhariwalArguments


def kept(run, ignored=()):
    """Bytes that autograd keeps of run()'s result, but for what `ignored` holds."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    held = {tensor.untyped_storage()._cdata for tensor in ignored}
    return sum(storage.nbytes() for key, storage in found.items() if key not in held), result


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("settings", [((1, 1), (1, 1), (1, 1), 1), ((2, 2), (0, 1), (1, 2), 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("built", [True, False])
def test_a_frozen_convolution(settings, layout, autocast, built, monkeypatch):
    if built and not native.is_loaded():
        pytest.skip("not built")
    monkeypatch.setattr(native, "is_loaded", lambda: built)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 9, 8, generator=g).to(memory_format=layout).requires_grad_()
    weight, bias = torch.randn(6, 4 // settings[-1], 3, 3, generator=g), torch.randn(6, generator=g)
    results = []
    for function in (nn.functional.conv2d, convolution):
        with torch.autocast(**BF16, enabled=autocast):
            held, y = kept(lambda function=function: function(x, weight, bias, *settings), ignored=[weight])
        (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        results.append((held, y, first, second))
    (its_bytes, *its), (bytes_kept, *mine) = results
    for a, b in zip(mine, its, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride()
    assert ("Cpp" in type(results[1][1].grad_fn).__name__) == built
    assert bytes_kept == (weight.numel() * 2 if autocast else 0) and its_bytes >= x.numel() * 2


def test_a_convolution_that_trains_is_pytorch_s():
    x, weight = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(4, 4, 3, 3, requires_grad=True)
    y = convolution(x, weight)
    assert type(y.grad_fn).__name__.startswith("Convolution")
    torch.autograd.grad(y.sum(), [x, weight])


PARTITIONED = {"backend": "aot_eager_decomp_partition"}


COMPILED = pytest.param("small", PARTITIONED, marks=pytest.mark.slow)
UNCOMPILED = [(name, False) for name in ("own adm", "unet2d_condition", "dhariwal", "small")]


@pytest.mark.parametrize(("name", "compile"), [*UNCOMPILED, COMPILED])
def test_no_input_of_a_convolution_is_kept(name, compile):
    torch.compiler.reset()
    network, x, arguments = frozen(name, compile=compile)
    plain = make(name)[0].requires_grad_(False)
    with emd_fast.use_backend("reference"):
        mine, _ = kept(lambda: output(network, x, arguments), ignored=network.state_dict().values())
    its, _ = kept(lambda: output(plain, x, arguments), ignored=plain.state_dict().values())
    assert 0 < mine < 0.75 * its
    torch.compiler.reset()


def full_size(name):
    """(network on the meta device in bfloat16, the arguments for a batch)."""
    with torch.device("meta"):
        if name == "adm":
            network = DhariwalUNet(DhariwalArguments(64, 3, 3, 1000))
            size, arguments = (3, 64, 64), lambda batch: (torch.zeros(batch, dtype=torch.int64),)
        else:
            network = pytest.importorskip("diffusers").UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
            size, arguments = (4, 64, 64), lambda batch: (torch.empty(batch, 77, 768, dtype=torch.bfloat16),)
    network = network.to(torch.bfloat16).eval().requires_grad_(False)

    def run(network, batch, with_input=False):
        x = torch.empty(batch, *size, device="meta", dtype=torch.bfloat16).requires_grad_()
        with torch.device("meta"):
            out = output(network, x, (torch.ones(batch), *arguments(batch)))
        return (x, out) if with_input else out

    return network, run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("adm", 170e6), ("sd15", 390e6)])
def test_bytes_kept_of_a_sample_at_full_size(name, most):
    """The figures of docs/fuse.md. The backend is one whose attention keeps what those of GPUs do: q, k, v, output."""
    network, run = full_size(name)
    emd_fast.fuse(network)
    with emd_fast.use_backend("reference"):
        one, _ = kept(lambda: run(network, 1), network.state_dict().values())
    assert 0.9 * most < one < most


def feed_forward(channels, norm=True, hook=None):
    """A norm and a GEGLU as diffusers' blocks have them, frozen: (fused, not fused)."""
    GEGLU = pytest.importorskip("diffusers.models.activations").GEGLU
    torch.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(channels) if norm else nn.Identity(), GEGLU(channels, 2 * channels))
    plain = plain.requires_grad_(False)
    if hook is not None:
        plain[0].register_forward_hook(hook)
    return emd_fast.fuse(copy.deepcopy(plain)), plain


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_gates_are_computed_again_bit_for_bit(monkeypatch, norm, autocast):
    fused, plain = feed_forward(32, norm)
    x = torch.randn(2, 9, 32, requires_grad=True)
    results = []
    for few in (geglu.FEW_CHANNELS, 0):
        monkeypatch.setattr(geglu, "FEW_CHANNELS", few)
        with torch.autocast(**BF16, enabled=autocast):
            held, y = kept(lambda: fused(x), fused.parameters())
        # Outside of autocast, as autograd runs it in a thread of its own.
        (first,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        (again,) = torch.autograd.grad(fused(x).square().sum(), x)
        results.append((held, second, y, first, again))
    (less, my_second, *mine), (more, its_second, *its) = results
    assert_all_same(mine, its)
    assert relative(my_second, its_second) < (0.02 if autocast else 1e-5)  # its sums are of another order
    statistics = 2 * x.numel() // 32 * 4 if norm else 0
    weights = 2 * plain[1].proj.weight.numel() if autocast else 0  # those that autocast rounded
    assert less <= 4 * x.numel() + statistics + weights < more


@pytest.mark.parametrize("how", ["hook", "in place"])
def test_a_change_behind_the_norm_is_not_passed_over(how):
    nets = feed_forward(32, hook=(lambda module, args, out: 2 * out) if how == "hook" else None)
    x = torch.randn(2, 9, 32, requires_grad=True)
    gradients = []
    for net in nets:
        normed = net[0](x)
        normed = normed.mul_(2) if how == "in place" else normed
        gradients.append(torch.autograd.grad(net[1](normed).square().sum(), x)[0])
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_blocks_compute_gates_again(monkeypatch):
    block = pytest.importorskip("diffusers.models.attention").BasicTransformerBlock
    torch.manual_seed(0)
    network = nn.ModuleList([block(32, 4, 8, cross_attention_dim=8) for _ in range(2)]).requires_grad_(False)
    emd_fast.fuse(network, compile=PARTITIONED)
    x, condition = torch.randn(1, 16, 32, requires_grad=True), torch.randn(1, 3, 8)
    results = []
    for few in (geglu.FEW_CHANNELS, 0):
        torch.compiler.reset()
        monkeypatch.setattr(geglu, "FEW_CHANNELS", few)
        held, y = kept(lambda: network[0](x, encoder_hidden_states=condition), network.parameters())
        results.append((held, y, *torch.autograd.grad(y.square().sum(), x)))
    (less, *mine), (more, *its) = results
    assert_all_same(mine, its)
    assert more - less > 7 * 4 * x.numel()
    torch.compiler.reset()


def test_gates_that_train_are_kept():
    fused, plain = feed_forward(32)
    x = torch.randn(2, 9, 32, requires_grad=True)
    for net in (fused, plain):
        net[1].requires_grad_(True)
        net(x).square().sum().backward()
    for mine, its in zip(fused.parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None)
        assert mine.grad is None or torch.allclose(mine.grad, its.grad, rtol=1e-5, atol=1e-5)


def test_a_norm_in_float32_keeps_its_input_in_two_bytes():
    x = torch.randn(2, 9, 32).bfloat16().requires_grad_()
    weight, bias = torch.randn(2, 32)
    held, mine = kept(lambda: layer_norm._ToInput.apply(x, torch.float32, weight, bias, (32,), 1e-5)[0], [weight, bias])
    its = nn.functional.layer_norm(x.float(), (32,), weight, bias, 1e-5)
    assert mine.dtype == its.dtype == torch.float32 and torch.equal(mine, its)
    grad = torch.randn_like(mine)
    assert torch.equal(*(torch.autograd.grad(y, x, grad)[0] for y in (mine, its)))
    assert held == 2 * x.numel() + 2 * 4 * 18


@pytest.mark.slow
def test_what_the_gates_cost_at_full_size():
    network, run = full_size("sd15")
    emd_fast.fuse(network)
    attention = (torch.ops.emd_fast.attention, torch.ops.emd_fast.attention_backward)
    with emd_fast.use_backend("reference"):
        with FlopCount(attention) as forward:
            x, out = run(network, 1, with_input=True)
        with FlopCount(attention) as backward:
            torch.autograd.grad(out, x, torch.ones_like(out))
    assert 33e9 < backward.total - 0.9956 * forward.total < 34e9 and backward.total <= 1.06 * forward.total


def test_packed_queries_keys_and_values_are_kept_once():
    """As the projection wrote them: the block of ADM unpacks them as views, and attention copies none."""
    heads, channels, tokens = 2, 16, 9
    x = torch.randn(3, tokens, channels, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(3 * channels, channels, generator=torch.Generator().manual_seed(1))

    def attended():
        q, k, v = nn.functional.linear(x, weight).unflatten(2, (3, heads, -1)).unbind(2)
        return attention(q, k, v)

    with emd_fast.use_backend("reference"):
        held, y = kept(attended, ignored=[weight])
    once = 4 * x.numel()
    per_query = 2 * 4 * 3 * heads * tokens  # two numbers of the softmax
    assert held == 3 * once + once + per_query  # q, k, v and the output
    torch.autograd.grad(y.sum(), x)
