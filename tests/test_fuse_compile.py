"""Fused networks under torch.compile: as a whole, and block by block by fuse(compile=True)."""

import copy
import functools
import shutil

import pytest
import torch
from helpers import assert_same, assert_within
from networks import make, output
from test_compile import Counting
from test_fuse import assert_close, gradients, relative
from torch._dynamo.utils import counters

import emd_fast
from emd_fast.em.frozen import frozen
from emd_fast.fusion import compiled_blocks, conditioning_cache

# Tracing a UNet takes seconds: one of each family, and those that take long only on request.
QUICK = ["shallow unet2d_condition", "song", "small", "own edm2"]
ALL = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in ("unet2d", "edm2", "own adm"))]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    compiled_blocks._compiled.cache_clear()
    yield
    torch._dynamo.reset()
    compiled_blocks._compiled.cache_clear()


@pytest.mark.parametrize("name", ALL)
def test_a_whole_network_is_one_graph(name):
    network, x, arguments = make(name)
    expected = gradients(emd_fast.fuse(network), x, arguments)
    # What AOTAutograd makes of it is seen of one network of a family here, and of each network's blocks below.
    counting = Counting("aot_eager" if name in QUICK else "eager")
    compiled = torch.compile(network, fullgraph=True, backend=counting)
    with conditioning_cache():  # which leaves compiled code alone
        for _ in range(2):
            assert_close(gradients(compiled, x, arguments), expected)
    assert counting.graphs == 1


@pytest.mark.parametrize("name", ALL)
def test_blocks_are_compiled_once_for_each_structure(name, caplog):
    network, x, arguments = make(name)
    expected = gradients(network, x, arguments)
    counting = Counting()
    with caplog.at_level("INFO", "emd_fast"):
        emd_fast.fuse(network, compile={"backend": counting})
        blocks = [m for m in network.modules() if "compile" in vars(m).get("_emd_fast", {})]
        structures = {vars(m)["_emd_fast"]["structure"] for m in blocks}
        assert_close(gradients(network, x, arguments), expected)
    assert len(blocks) >= 4 and len(structures) <= len(blocks)
    first = counting.graphs
    assert first <= len(structures) + 2  # one structure may stand at two resolutions
    assert not counters["graph_break"]
    assert sum("compiled" in record.message and " s" in record.message for record in caplog.records) == len(structures)
    for shift in (1, 2):
        gradients(network, x + shift, arguments)
    assert counting.graphs == first


def test_copies_share_the_compiled_code():
    teacher, x, arguments = make("small")
    counting = Counting()
    emd_fast.fuse(teacher, compile={"backend": counting})
    others = [copy.deepcopy(teacher).requires_grad_(True) for _ in range(2)]
    teacher.requires_grad_(False)
    for block in (block for other in others for block in other.modules()):
        if "compile" in vars(block).get("_emd_fast", {}):
            vars(block)["_emd_fast"]["compile"] = vars(teacher.down_block)["_emd_fast"]["compile"]

    def step():
        with torch.no_grad():
            for network in (teacher, *others):
                output(network, x, arguments)
        with frozen(others[0]):
            torch.autograd.grad(output(others[0], latent := x.clone().requires_grad_(), arguments).sum(), latent)
        for other in others:
            output(other, x, arguments).square().mean().backward()

    step()
    graphs = counting.graphs
    assert graphs <= 3 * 5  # three structures of blocks, five modes
    for _ in range(3):
        step()
    assert counting.graphs == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["shallow unet2d_condition", "small", "own ddpm++"])
def test_conditions_are_computed_once_outside_of_the_compiled_code(name):
    network, x, arguments = make(name)
    emd_fast.fuse(network, compile={"backend": "aot_eager"})
    calls = []
    for key, module in network.named_modules():
        if key.endswith(("attn2.to_k", "attn2.to_v", "time_emb_proj", "affine")):
            module.register_forward_hook(lambda *_, key=key: calls.append(key))
    with torch.no_grad():
        expected = [output(network, x + k, arguments) for k in range(3)]
        calls.clear()
        with conditioning_cache():
            for k in range(3):
                assert_same(output(network, x + k, arguments), expected[k])
    assert len(calls) == len(set(calls)) and (calls or name == "small")


def test_more_sizes_than_the_compiler_takes_run_without_it(caplog):
    """A picture or an evaluation is no reason to stop a run."""
    compiled_blocks._say_once.cache_clear()
    network, x, arguments = make("small")
    cases = [(x[:n], tuple(a[:n] for a in arguments)) for n in (1, 2, 1, 2)]
    cases += [(torch.cat([x] * n), tuple(torch.cat([a] * n) for a in arguments)) for n in (2, 3, 4)]
    counting = Counting()
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        expected = [output(network, *case) for case in cases]
        emd_fast.fuse(network, compile={"backend": counting})
        for case, result in zip(cases, expected, strict=True):
            assert relative(output(network, *case), result) < 1e-5
    blocks = [module for module in network.modules() if type(module).__name__ == "ResidualBlock"]
    structures = {compiled_blocks.structure(block) for block in blocks}
    assert counting.graphs == 2 * len(structures)
    assert caplog.text.count("as many sizes as torch.compile allows") == 1


def test_other_repeated_blocks():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

        def forward(self, x, scale=1.0):
            return x + scale * self.linear(self.norm(x))

    class Network(torch.nn.ModuleList):
        def forward(self, x):
            return functools.reduce(lambda x, block: block(x, scale=0.5), self, x)

    network, x = Network(Layer() for _ in range(4)), torch.randn(2, 3, 8)
    expected = network(x)
    counting = Counting()
    assert emd_fast.fuse(network, compile={"backend": counting}) is network
    assert_within(network(x), expected, 1e-6)
    assert counting.graphs == 2  # the first block's input asks for no gradient
    assert [part.note for part in emd_fast.fusion_report(network).fused] == ["repeated block, compiled"] * 4
    assert type(emd_fast.unfuse(network)[0]) is Layer


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("c++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["shallow unet2d_condition", "small"])
def test_blocks_under_inductor(name):
    network, x, arguments = make(name)
    expected = gradients(network, x, arguments)
    assert_close(gradients(emd_fast.fuse(network, compile=True), x, arguments), expected)
