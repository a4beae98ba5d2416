"""conditioning_cache: the same numbers, fewer products; nothing stale, nothing kept that has a gradient."""

import copy

import edm_files
import edm_plain
import pytest
import torch
from helpers import FlopCount, assert_alike, assert_all_same, assert_same, e_step_xz, randomised, seeded
from networks import FAMILIES, OWN, make, output
from torch import nn

import emd_fast
from emd_fast import Denoiser, Generator, Noise
from emd_fast.diffusion.schedules import EDM
from emd_fast.em.frozen import frozen
from emd_fast.fusion import conditioning_cache


def flops(run, *args):
    with FlopCount() as counter:
        result = run(*args)
    return result, counter.total


def passes(network, x, arguments, count=3):
    """Outputs and FLOPs of passes on different x."""
    with torch.no_grad():
        return [flops(output, network, x + k, arguments) for k in range(count)]


@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
def test_passes_after_the_first_do_less_and_give_the_same_bits(name):
    network, x, arguments = make(name)
    emd_fast.fuse(network)
    plain = passes(network, x, arguments)
    with conditioning_cache():
        cached = passes(network, x, arguments)
    assert_all_same(*([out for out, _ in each] for each in (cached, plain)))
    whole, (first, second, third) = plain[0][1], (count for _, count in cached)
    assert first == whole and third == second < whole
    if "no attention" in name:  # this one has no linear layers but those that see time and class
        saved = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.Linear))
        assert first - second == 2 * len(x) * saved
    assert passes(network, x, arguments)[0][1] == whole


def test_keys_and_values_are_saved():
    network, x, arguments = make("unet2d_condition")
    emd_fast.fuse(network)
    calls = []
    for key, module in network.named_modules():
        if key.endswith(("to_k", "to_v", "time_emb_proj", "time_embedding.linear_1")):
            module.register_forward_hook(lambda *_, key=key: calls.append(key))
    with conditioning_cache():
        passes(network, x, arguments, 4)
    own, others = ([key for key in calls if ("attn1" in key) == of_it] for of_it in (True, False))
    assert len(own) == 4 * len(set(own)) > 0 and len(others) == len(set(others)) == 4 * 2 + 8 + 1


class TestStale:
    @pytest.fixture(params=["small", "shallow unet2d_condition", "own edm2"])
    def case(self, request):
        network, *rest = make(request.param)
        with torch.no_grad():
            yield emd_fast.fuse(network), *rest

    def check(self, network, x, arguments):
        """The output in the block, which is that without it."""
        actual = output(network, x, arguments)
        outer = emd_fast.cache.conditioning._active
        cache, outer.cache = outer.cache, None
        try:
            assert_same(actual, output(network, x, arguments))
        finally:
            outer.cache = cache
        return actual

    def test_another_condition(self, case):
        network, x, (t, cond) = case
        with conditioning_cache() as cache:
            first, *others, again = (
                self.check(network, x, args) for args in ((t, cond), (t + 1, cond), (t, cond.flip(0)), (t, cond))
            )
            assert not any(torch.equal(first, other) for other in others)
            assert_same(first, again)
            for change in (lambda: t.add_(1), lambda: (t.sub_(1), cond.copy_(cond.flip(0)))):
                change()
                assert not torch.equal(first, self.check(network, x, (t, cond)))
            for k in range(12):  # more than are kept, in turn
                self.check(network, x, (t + k % 7, cond))
            assert len(cache._passes) <= 4

    def test_parameters_that_change(self, case):
        network, x, arguments = case
        with conditioning_cache():
            self.check(network, x, arguments)
            for change in (lambda p: p.add_(0.1), lambda p: setattr(p, "data", 1.1 * p.data)):
                for parameter in network.parameters():
                    change(parameter)
                    self.check(network, x, arguments)
            changed = {k: 1.1 * v if v.is_floating_point() else v for k, v in network.state_dict().items()}
            network.load_state_dict(changed, assign=True)
            self.check(network, x, arguments)

    def test_modes(self, case):
        network, x, arguments = case
        with conditioning_cache():
            self.check(network, x, arguments)
            for mode in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode()):
                with mode:
                    self.check(network, x, arguments)
                self.check(network, x, arguments)

    def test_other_networks(self, case):
        network, x, arguments = case
        other = copy.deepcopy(network)
        for parameter in other.parameters():
            parameter *= 1.1
        with conditioning_cache():
            assert not torch.equal(self.check(network, x, arguments), self.check(other, x, arguments))
        for given, saves in ((network, True), (Denoiser(network, EDM(), "eps"), True), (other, False)):
            with conditioning_cache(given):
                (_, first), (_, second), _ = passes(network, x, arguments)
            assert (second < first) == saves

    def test_nothing_outlives_the_block_or_an_exception(self, case):
        network, x, arguments = case
        (_, before), *_ = passes(network, x, arguments)
        with conditioning_cache() as cache:
            with pytest.raises(RuntimeError):
                output(network, x[:, :1], arguments)
            self.check(network, x, arguments)
            assert cache._passes and emd_fast.cache.conditioning._active.current is None
        assert not cache._passes and not cache._same and emd_fast.cache.conditioning._active.cache is None
        with conditioning_cache():
            assert passes(network, x, arguments)[0][1] == before


class TestGradients:
    @pytest.mark.parametrize("name", ["small", "unet2d_condition", "song", "own adm"])
    def test_to_parameters_and_to_the_input(self, name):
        network, x, arguments = make(name)
        emd_fast.fuse(network)

        def gradient(*wanted, k=0):
            latent = (x + k).requires_grad_()
            wanted = wanted or (latent,)
            found = torch.autograd.grad(output(network, latent, arguments).square().sum(), wanted, allow_unused=True)
            return torch.cat([g.flatten() for g in found if g is not None])

        exact = gradient(*network.parameters())
        with conditioning_cache():
            passes(network, x, arguments)
            for _ in range(2):
                assert_same(gradient(*network.parameters()), exact)
        with frozen(network):
            exact = [flops(lambda k=k: gradient(k=k)) for k in range(3)]
            with conditioning_cache():
                mine = [flops(lambda k=k: gradient(k=k)) for k in range(3)]
        assert_all_same(*([gradient for gradient, _ in each] for each in (mine, exact)))
        assert mine[1][1] < exact[1][1]

    def test_to_the_condition(self):
        network, x, (t, cond) = make("unet2d_condition")
        emd_fast.fuse(network)
        cond.requires_grad_()
        gradient = lambda: torch.autograd.grad(output(network, x, (t, cond)).square().sum(), cond)[0]  # noqa: E731
        with frozen(network):
            exact = gradient().clone()
            with conditioning_cache():
                passes(network, x, (t, cond))
                for _ in range(2):
                    assert_same(gradient(), exact)

    def test_no_graph_is_kept(self):
        network, x, arguments = make("small")
        emd_fast.fuse(network)
        with conditioning_cache() as cache:
            assert output(network, x, arguments).requires_grad
            held = [value for kept in cache._passes.values() for value, _ in kept.values.values()]
            assert not any(value.requires_grad for value in held)
            with torch.no_grad():
                assert not output(network, x, arguments).requires_grad

    def test_labels_dropped_in_training_are_drawn_anew(self):
        network = randomised(edm_plain.DhariwalUNet(**edm_files.TINY, label_dim=10, label_dropout=0.5), 0)
        network = emd_fast.fuse(network).train()
        x, arguments = torch.randn(8, 3, 8, 8), (torch.zeros(8), torch.eye(10)[:8])
        with torch.no_grad(), conditioning_cache():
            outs = [network(x, *arguments) for _ in range(4)]
        assert any(not torch.equal(outs[0], other) for other in outs[1:])


def denoisers(fused):
    made = [make("small", seed)[0] for seed in range(3)]
    given = [emd_fast.fuse(network) if fused else network for network in made]
    nets = [Denoiser(network, EDM(), "edm", sigma_data=0.5, null_cond=torch.tensor([0])) for network in given]
    return Generator(nets[0], 2.0), *nets[1:]


@pytest.mark.parametrize("run", [emd_fast.e_step, e_step_xz])
@pytest.mark.parametrize("guidance", [None, 2.0])
def test_the_e_step_computes_conditions_once(monkeypatch, run, guidance):
    g = seeded(5)
    z, eps = torch.randn(2, 4, 3, 8, 8, generator=g).unbind()
    t, cond = torch.rand(4, generator=g) + 0.2, torch.arange(4)
    options = {"cond": cond, "guidance": guidance, "gamma_eps": 0.1, "gamma_z": 0.05}

    def counted(networks):
        return flops(lambda: run(*networks, z, eps, t, steps=3, noise=Noise(0), **options))

    cached, fewer = counted(denoisers(fused=True))
    plain, unfused = counted(denoisers(fused=False))
    monkeypatch.setattr(conditioning_cache, "__enter__", lambda self: self)
    monkeypatch.setattr(conditioning_cache, "__exit__", lambda self, *exc: None)
    exact, whole = counted(denoisers(fused=True))
    assert_alike(cached, exact, 0.0)
    assert_alike(cached, plain, 1e-4)
    # Layers of the embedding: two products and additions for each weight and sample, in each pass after the first.
    network = denoisers(fused=False)[1].network
    one = 2 * 4 * sum(getattr(network, name).weight.numel() for name in ("noise_embedding", "embedding", "modulation"))
    samples = 3 if guidance is None else 4  # the teacher's pass is twice as large with guidance
    passes_more = 2 if run is e_step_xz else 0  # the generator's, before and behind the chain
    assert whole == unfused and whole - fewer == (2 * samples + passes_more) * one
