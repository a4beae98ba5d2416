"""What an E-step costs, and that it works on networks that somebody else wrapped; test_distributed has ranks."""

import functools
import gc
import weakref

import pytest
import torch
from helpers import FlopCount, Mlp, assert_alike, assert_within, compiled_flops, randomised, seeded
from test_e_step import inputs, networks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from emd_fast import Denoiser, Generator, Noise, e_step
from emd_fast.diffusion.schedules import Cosine
from emd_fast.em.fake_score_step import fake_score_step
from emd_fast.em.m_step import m_step


class Conv(nn.Module):
    """(B, 3, 8, 8) to itself; the first layer is wide, so that weight gradients would cost as much as the forward."""

    def __init__(self, seed):
        super().__init__()
        conv = functools.partial(nn.Conv2d, kernel_size=3, padding=1)
        self.layers = nn.Sequential(conv(3, 32), nn.SiLU(), conv(32, 32), nn.SiLU(), conv(32, 3))
        randomised(self, seed)

    def forward(self, x, t, cond=None):
        return self.layers(x)


def images():
    first, *nets = (Denoiser(Conv(seed), Cosine(), "v") for seed in (1, 2, 3))
    return (Generator(first, 0.8), *nets), (*torch.randn(2, 2, 3, 8, 8, generator=seeded(0)), torch.tensor([0.3, 0.7]))


def test_flops_of_the_backward_pass_in_eager_code():
    nets, latents = images()
    with FlopCount() as forward:
        nets[0](latents[0])
    flops = {}
    for gamma_z in (0.0, 0.1):
        with FlopCount() as counter:
            e_step(*nets, *latents, steps=3, gamma_eps=0.1, gamma_z=gamma_z, noise=Noise(0))
        flops[gamma_z] = counter.total
    one = forward.total
    # 3 passes of teacher and fake score and one of the generator; or as many of it as steps, and backward.
    assert flops[0.0] == (2 * 3 + 1) * one
    backward = (flops[0.1] - (2 * 3 + 3) * one) / 3
    assert 0.9 * one <= backward <= 1.1 * one


def test_flops_of_the_backward_pass_in_compiled_code():
    (generator, teacher, fake_score), latents = images()
    torch._dynamo.reset()
    backend, counted = compiled_flops()
    compiled = torch.compile(generator, fullgraph=True, backend=backend)
    options = {"steps": 2, "gamma_eps": 0.1, "gamma_z": 0.1}
    expected = e_step(generator, teacher, fake_score, *latents, noise=Noise(0), **options)
    result = e_step(compiled, teacher, fake_score, *latents, noise=Noise(0), **options)
    assert_within(result.z, expected.z, 1e-5)
    assert counted["forward"] > 0
    assert 0.9 * counted["forward"] <= counted["backward"] <= 1.1 * counted["forward"]


@pytest.mark.parametrize("gamma_z", [0.0, 0.1])
def test_no_output_of_an_earlier_step_stays_alive(gamma_z):
    (generator, teacher, fake_score), latents = images()
    outputs, alive = [], []

    def recording(z, cond=None):
        gc.collect()
        alive.append(sum(ref() is not None for ref in outputs))
        x = generator(z, cond)
        outputs.append(weakref.ref(x))
        return x

    e_step(recording, teacher, fake_score, *latents, steps=8, gamma_eps=0.1, gamma_z=gamma_z, noise=Noise(0))
    assert max(alive) <= 1  # the graph of the step before may live until it is replaced
    assert len(alive) == (8 if gamma_z else 1)


def test_teacher_and_fake_score_run_once_a_step_without_gradients():
    calls = []
    (generator, teacher, fake_score), latents = images()
    for name, net in (("teacher", teacher), ("fake_score", fake_score)):
        net.register_forward_hook(lambda m, a, out, name=name: calls.append((name, out.requires_grad)))
    e_step(generator, teacher, fake_score, *latents, steps=2, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    assert calls == [("teacher", False), ("fake_score", False)] * 2


def wrapped(how, net):
    for word in reversed(how.split(" of ")):
        net = DistributedDataParallel(net) if word == "ddp" else torch.compile(net, backend="aot_eager", dynamic=False)
    return net


@pytest.mark.parametrize("how", ["compiled", "ddp of compiled", "compiled of ddp"])
def test_wrapped_networks(one_process, how):
    z, eps, t = inputs()
    torch._dynamo.reset()
    bare, nets = networks(), networks()
    outer = [wrapped(how, net) for net in nets]
    options = {"steps": 2, "gamma_eps": 0.2, "gamma_z": 0.05}
    for step in range(2):
        results = [e_step(*group, z, eps, t, noise=Noise(0, step=step), **options) for group in (bare, outer)]
        assert_alike(*reversed(results), 1e-5)
        for group, result in zip((bare, outer), results, strict=True):
            group[0].zero_grad()
            m_step(group[0], result, torch.ones(5)).mean().backward()
            fake_score_step(group[0], group[2], z, eps, t).mean().backward()
        for mine, its in zip(nets[0].parameters(), bare[0].parameters(), strict=True):
            assert_within(mine.grad, its.grad, 1e-5 * (1 + float(its.grad.abs().max())))
        with torch.no_grad():
            for group in (bare, nets):
                for p in group[0].parameters():
                    p -= 0.1 * p.grad


def test_a_generator_with_ddp_inside(one_process):
    z, eps, t = inputs()
    inner = DistributedDataParallel(Mlp(seed=1))
    generator, others = Generator(Denoiser(inner, Cosine(), "v"), 0.8), networks()[1:]
    for step in range(2):
        result = e_step(generator, *others, z, eps, t, steps=2, gamma_eps=0.2, gamma_z=0.05, noise=Noise(0, step))
        m_step(generator, result, torch.ones(5)).mean().backward()
    assert all(p.grad is not None for p in inner.parameters())
