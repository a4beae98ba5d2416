"""Weights prepared once per E-step, and what autograd keeps of frozen networks."""

import contextlib
import copy
import pickle

import pytest
import torch
from networks import FAMILIES, OWN, make, output
from test_fuse import relative
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import emd_fast
from emd_fast import Denoiser, Generator, Noise, e_step
from emd_fast.backends import native
from emd_fast.prepared import PREPARED, prepared
from emd_fast.schedules import EDM
from emd_fast.teachers.edm_networks import DhariwalUNet
from emd_fast.teachers.edm_networks.arguments import DhariwalArguments
from emd_fast.unet.convolution import _to_input as to_input
from emd_fast.unet.convolution import convolution

NAMES = [*FAMILIES, *OWN]
BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def frozen(name, **options):
    network, x, arguments = make(name)
    return emd_fast.fuse(network.requires_grad_(False), **options), x.requires_grad_(), arguments


def passes(network, x, arguments, autocast=True):
    """The output and its gradient to the input."""
    with torch.autocast(**BF16, enabled=autocast):
        out = output(network, x, arguments)
    return out, *torch.autograd.grad(out.float().square().sum(), x)


class Converted(TorchDispatchMode):
    """Elements of parameters that are converted or read by a reduction."""

    def __init__(self, network):
        super().__init__()
        self.addresses = {p.data_ptr() for p in network.parameters() if p.dim() > 1}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.linalg_vector_norm.default):
            self.elements += args[0].numel() * (args[0].data_ptr() in self.addresses)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_the_results_stay_bit_for_bit(name, autocast):
    network, x, arguments = frozen(name)
    expected = passes(network, x, arguments, autocast)
    keys = [(key, value.dtype) for key, value in network.state_dict().items()]
    with torch.autocast(**BF16, enabled=autocast), prepared(network):
        assert any(vars(module).get(PREPARED) for module in network.modules()) == (autocast or "edm2" in name)
        actual = passes(network, x, arguments, autocast)
        assert [(key, value.dtype) for key, value in network.state_dict().items()] == keys
    for mine, its in zip(actual, expected, strict=True):
        assert mine.dtype == its.dtype and torch.equal(mine, its)
    assert not any(vars(module).get(PREPARED) for module in network.modules())


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_is_converted_or_normalised_in_a_pass(name):
    network, x, arguments = frozen(name)
    with torch.autocast(**BF16):
        with Converted(network) as outside:
            passes(network, x, arguments)
        with prepared(network), emd_fast.unet.conditioning_cache():
            passes(network, x, arguments)
            with Converted(network) as inside:
                passes(network, x, arguments)
    assert outside.elements > 0
    # What is left: layers that change the resolution, and EDM2's last, whose gain is a parameter.
    allowed = sum(p.numel() for key, p in network.named_parameters() if "out_conv" in key) if "edm2" in name else 0
    assert inside.elements <= allowed


def denoisers(name):
    made = [make(name, seed)[0] for seed in range(3)]
    for network in made:
        emd_fast.fuse(network)
    teacher, student, generator = (Denoiser(network, EDM(), "edm", sigma_data=0.5) for network in made)
    return Generator(generator, 2.0), teacher, student


def test_an_e_step_reads_what_the_weights_are_then(monkeypatch):
    """Also after a change that no version counter has seen, as those of some optimizers are."""
    networks = denoisers("small")
    z, eps = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    options = {"cond": torch.arange(4), "gamma_eps": 0.1, "gamma_z": 0.05, "steps": 2}

    def run(step):
        with torch.autocast(**BF16):
            found = e_step(*networks, z, eps, torch.full((4,), 0.5), noise=Noise(0, step=step), **options)
        return torch.cat([found.z, found.eps, found.drift])

    mine = [run(0)]
    for network in networks:
        for parameter in network.parameters():
            parameter.data += 0.1 * parameter.data.abs()
    mine.append(run(1))
    monkeypatch.setattr("emd_fast.em.e_step.prepared", lambda *networks: contextlib.nullcontext())
    its = [run(1)]
    for network in networks:
        for parameter in network.parameters():
            assert parameter.grad is None
    assert torch.equal(mine[1], its[0]) and not torch.equal(mine[0], mine[1])


def test_gradients_of_parameters_and_other_precisions_inside():
    network, x, arguments = make("small")
    emd_fast.fuse(network)
    with torch.autocast(**BF16), prepared(network):
        output(network, x, arguments).float().square().sum().backward()
        assert all(p.grad is not None for p in network.parameters())
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            inside = output(network, x, arguments)
    with torch.no_grad():
        assert torch.equal(inside, output(network, x, arguments))


def test_copies_made_inside_have_nothing_prepared():
    network, x, arguments = frozen("small")
    with torch.autocast(**BF16), prepared(network), prepared(network):
        pass
    with torch.autocast(**BF16), prepared(network):
        with prepared(network):
            pass
        assert vars(network.first)[PREPARED]
        copies = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
    for other in copies:
        assert not any(vars(module).get(PREPARED) for module in other.modules())
        assert torch.equal(output(other, x, arguments), output(network, x, arguments))


def test_layers_that_are_reparametrised_afterwards():
    network, x, arguments = make("small")
    emd_fast.fuse(network)
    expected = output(network, x, arguments)
    nn.utils.parametrizations.weight_norm(network.first)
    prune.identity(network.last, "weight")
    with prepared(network):
        assert relative(output(network, x, arguments), expected) < 1e-5
    prune.remove(network.last, "weight")
    nn.utils.parametrize.remove_parametrizations(network.first, "weight")
    assert relative(output(network, x, arguments), expected) < 1e-5


def test_compiled_blocks_read_what_was_prepared():
    """They are given no weight of a convolution that they would have to convert."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([tensor for tensor in inputs if isinstance(tensor, nn.Parameter) and tensor.dim() == 4])
        return graph.forward

    torch.compiler.reset()
    network, x, arguments = frozen("small", compile={"backend": backend})
    with torch.autocast(**BF16):
        passes(network, x, arguments)
        without = len(graphs)
        for _ in range(2):
            with prepared(network):
                passes(network, x, arguments)
    assert without and any(graphs[:without]) and len(graphs) == 2 * without
    assert not any(graphs[without:])
    torch.compiler.reset()


def test_a_whole_compiled_network_notices_both_ends_of_the_block():
    """First called inside: outside it must read the parameters, as they are then."""
    torch.compiler.reset()
    network, x, arguments = frozen("small")
    compiled = torch.compile(network, backend="eager")
    with torch.autocast(**BF16), torch.no_grad():
        with prepared(network):
            inside = compiled(x, *arguments)
        assert torch.equal(inside, network(x, *arguments))
        for parameter in network.parameters():
            parameter.mul_(1.5)
        assert torch.equal(compiled(x, *arguments), network(x, *arguments))
        with prepared(network):
            assert torch.equal(compiled(x, *arguments), network(x, *arguments))
    torch.compiler.reset()


# What autograd keeps ------------------------------------------------------------------------------------------------


def kept(run, ignored=()):
    """Bytes that autograd keeps of run()'s result, but for what `ignored` holds."""
    held = {tensor.untyped_storage()._cdata for tensor in ignored}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in held:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(storage.nbytes() for storage in found.values()), result


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("settings", [((1, 1), (1, 1), (1, 1), 1), ((2, 2), (0, 1), (1, 2), 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("built", [True, False])
def test_a_frozen_convolution(settings, layout, autocast, built, monkeypatch):
    """The numbers of PyTorch's bit for bit, twice differentiable, nothing kept but the weight: that of csrc/, and that
    of Python."""
    if built and not native.is_loaded():
        pytest.skip("not built")
    monkeypatch.setattr(native, "is_loaded", lambda: built)
    monkeypatch.setattr("emd_fast.unet.convolution._to_input", to_input.__wrapped__)
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
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 4, 6, 6, generator=g).requires_grad_(), torch.randn(4, 4, 3, 3, generator=g)
    y = convolution(x, weight.requires_grad_())
    assert type(y.grad_fn).__name__.startswith("Convolution")
    torch.autograd.grad(y.sum(), [x, weight])


PARTITIONED = {"backend": "aot_eager_decomp_partition"}


@pytest.mark.parametrize(
    ("name", "compile"),
    [
        *((name, False) for name in ("own adm", "unet2d_condition", "dhariwal", "small")),
        pytest.param("small", PARTITIONED, marks=pytest.mark.slow),
    ],
)
def test_no_input_of_a_convolution_is_kept(name, compile):
    """Every kept tensor is one that a norm, an attention, a gate or a resampling reads again."""
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
    made = {"device": "meta", "dtype": torch.bfloat16}

    def run(network, batch):
        x = torch.empty(batch, *size, **made).requires_grad_()
        with torch.device("meta"):
            return output(network, x, (torch.ones(batch), *arguments(batch)))

    return network, run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("adm", 115e6), ("sd15", 492e6)])
def test_bytes_kept_of_a_sample_at_full_size(name, most):
    """The figures of docs/fuse.md. The backend is one whose attention keeps what those of GPUs do: q, k, v, output."""
    network, run = full_size(name)
    emd_fast.fuse(network)
    with emd_fast.use_backend("reference"):
        one, two = (kept(lambda batch=batch: run(network, batch), network.state_dict().values())[0] for batch in (1, 2))
    assert 0.9 * most < two - one < most
