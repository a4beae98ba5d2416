"""Fused networks in the E-step: work of the backward pass, memory, sharding."""

import copy

import pytest
import torch
from helpers import FlopCount, assert_alike, assert_within, compiled_flops
from networks import make, output
from test_fuse import relative
from torch.nn.parallel import DistributedDataParallel

import emd_fast
from emd_fast import Denoiser, Generator, Noise, e_step
from emd_fast.diffusion.schedules import EDM
from emd_fast.em.fake_score_step import fake_score_step
from emd_fast.em.frozen import frozen
from emd_fast.em.m_step import m_step


@pytest.mark.parametrize("name", ["dhariwal", "unet2d, scale_shift, resnet", "small"])
def test_the_backward_pass_costs_a_forward_pass(backend, name):
    network, x, arguments = make(name)
    emd_fast.fuse(network)
    latent = x.requires_grad_()

    def backward(*wanted):
        with FlopCount() as forward:
            out = output(network, latent, arguments)
        with FlopCount() as counter:
            torch.autograd.grad(out, wanted, torch.ones_like(out))
        return counter.total / forward.total

    with frozen(network):
        assert 0.8 < backward(latent) <= 1.06
    assert backward(latent, *network.parameters()) > 1.8


def test_the_compiled_backward_pass_costs_a_forward_pass():
    network, x, arguments = make("dhariwal")
    torch._dynamo.reset()
    backend, counted = compiled_flops()
    compiled = torch.compile(emd_fast.fuse(network), fullgraph=True, backend=backend)
    latent = x.requires_grad_()
    with frozen(network):
        mine, exact = (torch.autograd.grad(net(latent, *arguments).sum(), latent)[0] for net in (compiled, network))
    assert relative(mine, exact) < 1e-5
    assert 0.8 * counted["forward"] < counted["backward"] <= 1.06 * counted["forward"]
    torch._dynamo.reset()


def networks(fused, **options):
    nets = [make("small", seed)[0] for seed in range(3)]
    nets = [emd_fast.fuse(net, **options) if fused else net for net in nets]
    teacher, fake_score, generator = (Denoiser(net, EDM(), "edm", sigma_data=0.5) for net in nets)
    return Generator(generator, 2.0), teacher, fake_score


def latents():
    g = torch.Generator().manual_seed(1)
    z, eps = torch.randn(2, 4, 3, 8, 8, generator=g).unbind()
    return z, eps, torch.rand(4, generator=g) + 0.2


OPTIONS = {"cond": torch.arange(4), "gamma_eps": 0.1, "gamma_z": 0.05}


def test_memory_does_not_grow_with_steps():
    nets, now, peak = networks(True), 0, {}

    class Held:
        def __init__(self, tensor):
            nonlocal now
            self.tensor = tensor
            now += tensor.numel()
            peak[steps] = max(peak.get(steps, 0), now)

        def __del__(self):
            nonlocal now
            now -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        for steps in (1, 2, 8):
            e_step(*nets, *latents(), steps=steps, noise=Noise(0), **OPTIONS)
    assert peak[1] > 0 and peak[8] <= peak[2] <= 2 * peak[1]


@pytest.mark.parametrize("how", ["sharded after fuse", "sharded before fuse", "ddp", "compiled blocks"])
def test_wrapped_networks(one_process, how):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, bare = init_device_mesh("cpu", (1,)), networks(False)
    compiled = {"compile": {"backend": "aot_eager"}} if how == "compiled blocks" else {}
    nets = networks(how != "sharded before fuse", **compiled)
    inner = [getattr(net, "denoiser", net).network for net in nets]
    for net in inner if "sharded" in how else ():
        for block in (net.down_block, net.middle_block, net.attention, net.second_block, net.up_block):
            fully_shard(block, mesh=mesh)
        # A root that keeps its gathered parameters, as it does by default, does not see an update after a pass without
        # gradients: so it is with networks that are not fused.
        fully_shard(net, mesh=mesh, reshard_after_forward=True)
        if how == "sharded before fuse":
            emd_fast.fuse(net)
    outer = [DistributedDataParallel(net) for net in nets] if how == "ddp" else nets
    parameters = [list(group[0].parameters()) for group in (bare, nets)]
    z, eps, t = latents()
    torch._dynamo.reset()
    for step in range(2):
        results = [e_step(*group, z, eps, t, steps=2, noise=Noise(0, step=step), **OPTIONS) for group in (bare, outer)]
        assert_alike(*reversed(results), 1e-4)
        for group, result in zip((bare, outer), results, strict=True):
            group[0].zero_grad()
            m_step(group[0], result, torch.ones(4)).mean().backward()
            fake_score_step(group[0], group[2], z, eps, t, cond=OPTIONS["cond"]).mean().backward()
        for its, mine in zip(*parameters, strict=True):
            grad = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
            assert_within(grad, its.grad, 1e-4 * (1e-3 + float(its.grad.abs().max())))
        for held in parameters:
            torch.optim.SGD(held, lr=0.1).step()
    if how == "sharded after fuse":
        before = [type(module) for module in inner[0].modules()]
        with pytest.raises(ValueError, match="sharded after fuse"):
            emd_fast.unfuse(inner[0])
        assert before == [type(module) for module in inner[0].modules()]
    elif how == "sharded before fuse":
        emd_fast.unfuse(inner[0])
        assert not emd_fast.fusion_report(inner[0]).fused


def test_gradient_checkpointing():
    network, x, arguments = make("unet2d_condition")
    emd_fast.fuse(network)
    results = []
    for checkpointed in (False, True):
        net = copy.deepcopy(network).train()
        if checkpointed:
            net.enable_gradient_checkpointing()
        with emd_fast.fusion.conditioning_cache():
            output(net, x, arguments).square().sum().backward()
        results.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert relative(*results) < 1e-6
