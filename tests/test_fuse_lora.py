"""Fused networks with LoRA of peft in their projections and convolutions, as diffusers loads it."""

import copy
from functools import partial

import pytest
import torch
from helpers import assert_all_same
from networks import make, output
from safetensors.torch import load_file
from test_fuse import relative
from test_fuse_weight_cache import BF16, passes

import emd_fast
from emd_fast.cache.weights import WEIGHT_CACHE, weight_cache

peft = pytest.importorskip("peft")
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "proj", "time_emb_proj", "linear_1"]


def adapt(network, name="default", seed=1, **options):
    torch.manual_seed(seed)
    settings = {"r": 4, "target_modules": LAYERS, "init_lora_weights": False, **options}
    network.add_adapter(peft.LoraConfig(**settings), adapter_name=name)


def adapted(order, **options):
    """(fused, not fused, x, arguments), both with the same adapter, loaded before fuse() or after it."""
    fused, x, arguments = make("shallow unet2d_condition")
    plain = copy.deepcopy(fused)
    fused = emd_fast.fuse(fused) if order == "after" else fused
    for network in (fused, plain):
        adapt(network, **options)
    return emd_fast.fuse(fused), plain, x, arguments


def outcome(network, x, arguments):
    """The output, its gradient to the input and to every parameter that trains."""
    x = x.detach().clone().requires_grad_()
    out = output(network, x, arguments)
    wanted = [x, *(p for p in network.parameters() if p.requires_grad)]
    found = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
    return [out.detach(), *(grad for grad in found if grad is not None)]


@pytest.mark.parametrize("order", ["before", "after"])
def test_adapters_that_come_and_go(order):
    *networks, x, arguments = adapted(order)
    for change, *given in (
        ("eval",), ("requires_grad_", False), (partial(adapt, r=2, target_modules=["to_q", "conv1"]), "second", 2),
        ("set_adapter", "default"), ("set_adapter", ["default", "second"]), ("disable_adapters",), ("enable_adapters",),
        ("fuse_lora",), ("unfuse_lora",), ("delete_adapters", "default"), ("unload_lora",), (adapt, "third", 3),
    ):  # fmt: skip
        for network in networks:
            (change if callable(change) else getattr(type(network), change))(network, *given)
        mine, its = (outcome(network, x, arguments) for network in networks)
        assert max(relative(a, b) for a, b in zip(mine, its, strict=True)) < 1e-5


@pytest.mark.parametrize("order", ["before", "after"])
def test_what_is_saved_and_undone(order, tmp_path):
    fused, plain, x, arguments = adapted(order)
    for name, network in (("fused", fused), ("plain", plain)):
        network.save_lora_adapter(tmp_path / name), network.save_pretrained(tmp_path / name)
    for its in (tmp_path / "plain").iterdir():
        mine = tmp_path / "fused" / its.name
        if its.suffix == ".safetensors":
            mine, its = load_file(mine), load_file(its)
            assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in its)
        else:
            assert mine.read_bytes() == its.read_bytes()
    emd_fast.unfuse(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in plain.modules()]
    assert_all_same(outcome(fused, x, arguments), outcome(plain, x, arguments))


@pytest.mark.parametrize("dora", [False, True])
def test_prepared_weights_stay_bit_for_bit(dora):
    """DoRA computes with the weight itself, which must not be the rounded one."""
    fused, _, x, arguments = adapted("before", use_dora=dora, target_modules=["to_q", "conv1", "proj"])
    fused.requires_grad_(False)
    expected = passes(fused, x.requires_grad_(), arguments)
    with torch.autocast(**BF16), weight_cache(fused):
        held = [vars(part).get(WEIGHT_CACHE) for key, part in fused.named_modules() if key.endswith("to_q.base_layer")]
        assert held and all(bool(part) != dora for part in held)
        assert_all_same(passes(fused, x, arguments), expected)


def test_an_adapter_that_is_switched_inside_the_cache():
    fused, _, x, arguments = adapted("before")
    adapt(fused, "second", 2)
    with torch.no_grad():
        with emd_fast.fusion.conditioning_cache():
            output(fused, x, arguments)
            fused.set_adapter("default")
            mine = output(fused, x, arguments)
        assert torch.equal(mine, output(fused, x, arguments))


@pytest.mark.parametrize("order", ["before", "after", "never"])
def test_adapters_in_the_attention_of_own_networks(order):
    network, x, arguments = make("own adm")
    without = output(network, x, arguments)
    network = emd_fast.fuse(network) if order == "after" else network
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=4, target_modules=["qkv", "proj"], init_lora_weights=False)
    peft.inject_adapter_in_model(settings, network)
    network = (emd_fast.fuse(network) if order == "before" else network).requires_grad_(False)
    beside = output(network, x, arguments)
    with weight_cache(network):
        assert torch.equal(output(network, x, arguments), beside)
    for module in network.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    merged = output(network, x, arguments)
    assert relative(beside, merged) < 1e-5 < 1e-3 < relative(without, merged)
