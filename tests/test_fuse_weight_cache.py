"""weight_cache: weights cast or normalised once per E-step."""

import contextlib
import copy
import pickle

import pytest
import torch
from helpers import assert_all_same
from networks import FAMILIES, OWN, make, output
from test_fuse import relative
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import emd_fast
from emd_fast import Denoiser, Generator, Noise, e_step
from emd_fast.cache.layers import QKVWeight
from emd_fast.cache.weights import WEIGHT_CACHE, weight_cache
from emd_fast.diffusion.schedules import EDM
from emd_fast.distributed import gathered

BF16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def frozen(name, **options):
    network, x, arguments = make(name)
    return emd_fast.fuse(network.requires_grad_(False), **options), x.requires_grad_(), arguments


def passes(network, x, arguments, autocast=True):
    """The output and its gradient to the input."""
    with torch.autocast(**BF16, enabled=autocast):
        out = output(network, x, arguments)
    return out, *torch.autograd.grad(out.float().square().sum(), x)


def cached(network):
    return any(vars(module).get(WEIGHT_CACHE) for module in network.modules())


class Counted(TorchDispatchMode):
    """Elements of parameters that are converted or read by a reduction, and elements that are copied."""

    def __init__(self, network):
        super().__init__()
        self.addresses = {p.data_ptr() for p in network.parameters() if p.dim() > 1}
        self.converted = self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.linalg_vector_norm.default):
            self.converted += args[0].numel() * (args[0].data_ptr() in self.addresses)
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.copied += args[0].numel()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", [*FAMILIES, *OWN, "unfused own ddpm++", "unfused own edm2"])
def test_the_results_stay_bit_for_bit(name, autocast):
    network, x, arguments = frozen(name.removeprefix("unfused "))
    network = emd_fast.unfuse(network) if "unfused" in name else network
    expected = passes(network, x, arguments, autocast)
    keys = [(key, value.dtype) for key, value in network.state_dict().items()]
    with torch.autocast(**BF16, enabled=autocast), weight_cache(network):
        always = "edm2" in name or any(isinstance(module, QKVWeight) for module in network.modules())
        assert cached(network) == (autocast or always)
        actual = passes(network, x, arguments, autocast)
        assert [(key, value.dtype) for key, value in network.state_dict().items()] == keys
    assert_all_same(actual, expected)
    assert not cached(network)


@pytest.mark.parametrize("name", ["unet2d_condition", "song", "edm2", "small", "own ncsn++", "own edm2"])
def test_no_weight_is_converted_or_normalised_in_a_pass(name):
    network, x, arguments = frozen(name)
    with torch.autocast(**BF16):
        with Counted(network) as outside:
            passes(network, x, arguments)
        with weight_cache(network), emd_fast.fusion.conditioning_cache():
            passes(network, x, arguments)
            with Counted(network) as inside:
                passes(network, x, arguments)
    # EDM2's last gain is a parameter.
    allowed = sum(p.numel() for key, p in network.named_parameters() if "out_conv" in key) if "edm2" in name else 0
    assert outside.converted > 0 and inside.converted <= allowed


@pytest.mark.parametrize("name", ["song", "own adm"])
def test_neither_q_k_v_nor_their_weights_are_copied_in_a_pass(name):
    network, x, arguments = frozen(name)
    x = x.contiguous(memory_format=torch.channels_last)  # as the network would make it
    with Counted(network) as outside:
        passes(network, x, arguments, autocast=False)
    with weight_cache(network), Counted(network) as inside:
        passes(network, x, arguments, autocast=False)
    packed = [module for module in network.modules() if isinstance(module, QKVWeight)]
    assert packed and outside.copied - inside.copied >= sum(module.weight.numel() for module in packed)
    assert name.startswith("own") or not inside.copied


@pytest.mark.parametrize("layer", ["qkv", "proj"])
@pytest.mark.parametrize("name", ["dhariwal", "own adm"])
def test_hooks_of_attention_are_called(name, layer):
    network, x, arguments = frozen(name)
    doubled = make(name)[0].requires_grad_(False)
    without = output(doubled, x, arguments)
    for module in network.modules():
        if hasattr(module, layer):
            getattr(module, layer).register_forward_hook(lambda module, args, out: 2 * out)
    for key, parameter in doubled.named_parameters():
        if f".{layer}." in key:
            parameter *= 2
    expected = output(doubled, x, arguments)
    with weight_cache(network):
        assert relative(output(network, x, arguments), expected) < 1e-5 < 1e-3 < relative(without, expected)


def test_an_e_step_reads_what_the_weights_are_then(monkeypatch):
    """Also after a change that no version counter has seen, as those of some optimizers are."""
    made = [emd_fast.fuse(make("small", seed)[0]) for seed in range(3)]
    teacher, fake_score, generator = (Denoiser(network, EDM(), "edm", sigma_data=0.5) for network in made)
    z, eps = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    options = {"cond": torch.arange(4), "gamma_eps": 0.1, "gamma_z": 0.05, "steps": 2}

    def run(step):
        networks = Generator(generator, 2.0), teacher, fake_score
        with torch.autocast(**BF16):
            found = e_step(*networks, z, eps, torch.full((4,), 0.5), noise=Noise(0, step=step), **options)
        return torch.cat([found.z, found.eps, found.drift])

    before = run(0)
    for parameter in (p for network in made for p in network.parameters()):
        parameter.data += 0.1 * parameter.data.abs()
    mine = run(1)
    monkeypatch.setattr("emd_fast.em.e_step.weight_cache", lambda *networks: contextlib.nullcontext())
    assert torch.equal(mine, run(1)) and not torch.equal(before, mine)


def test_gradients_of_parameters_and_other_precisions_inside():
    network, x, arguments = make("small")
    emd_fast.fuse(network)
    with torch.autocast(**BF16), weight_cache(network):
        output(network, x, arguments).float().square().sum().backward()
        assert all(p.grad is not None for p in network.parameters())
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            inside = output(network, x, arguments)
    with torch.no_grad():
        assert torch.equal(inside, output(network, x, arguments))


def test_copies_made_inside_have_nothing_prepared():
    network, x, arguments = frozen("small")
    with torch.autocast(**BF16), weight_cache(network):
        with weight_cache(network):
            pass
        assert vars(network.first)[WEIGHT_CACHE]
        copies = copy.deepcopy(network), pickle.loads(pickle.dumps(network))
    for other in copies:
        assert not cached(other)
        assert torch.equal(output(other, x, arguments), output(network, x, arguments))


def test_layers_that_are_reparametrised_afterwards():
    network, x, arguments = make("small")
    expected = output(emd_fast.fuse(network), x, arguments)
    nn.utils.parametrizations.weight_norm(network.first)
    prune.identity(network.last, "weight")
    with weight_cache(network):
        assert relative(output(network, x, arguments), expected) < 1e-5
    prune.remove(network.last, "weight")
    nn.utils.parametrize.remove_parametrizations(network.first, "weight")
    assert relative(output(network, x, arguments), expected) < 1e-5


def test_compiled_blocks_read_what_was_prepared():
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
            with weight_cache(network):
                passes(network, x, arguments)
    assert without and any(graphs[:without]) and len(graphs) == 2 * without
    assert not any(graphs[without:])
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["small", "own edm2"])
def test_a_whole_compiled_network_notices_both_ends_of_the_block(name):
    torch.compiler.reset()
    network, x, arguments = frozen(name)
    compiled = torch.compile(network, backend="eager")
    # Eager convolutions are PyTorch's then, as compiled ones are.
    with torch.autocast(**BF16), torch.no_grad(), emd_fast.use_backend("reference"):
        with weight_cache(network):
            inside = compiled(x, *arguments)
        assert torch.equal(inside, network(x, *arguments))
        for parameter in network.parameters():
            parameter.mul_(1.5)
        assert torch.equal(compiled(x, *arguments), network(x, *arguments))
        with weight_cache(network):
            assert torch.equal(compiled(x, *arguments), network(x, *arguments))
    torch.compiler.reset()


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_sharded_weights_are_prepared_as_the_report_says(one_process, precision):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    network, _, _ = make("small")
    assert not any("FSDP2" in part.note for part in emd_fast.fusion_report(emd_fast.fuse(network)).layers)
    fully_shard(network, mp_policy=MixedPrecisionPolicy(param_dtype=precision))
    notes = {part.note for part in emd_fast.fusion_report(network).layers}
    assert notes and all("if FSDP2 gathers it in float32; as it is gathered in any other" in note for note in notes)
    with torch.autocast(**BF16), gathered(network), weight_cache(network):
        assert cached(network) == (precision is None)
