"""The E-step against a plain float64 re-implementation of docs/algorithm.md, and what it must leave alone."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from helpers import (
    Mlp,
    assert_as_good_as_eager,
    assert_same,
    assert_within,
    column,
    e_step_xz,
    naming,
    normals,
    randomised,
    seeded,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import emd_fast
from emd_fast import Denoiser, Generator, Noise, e_step
from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow
from emd_fast.em.fake_score_step import fake_score_step
from emd_fast.em.m_step import m_step
from emd_fast.teachers import gaussian

BETAS = torch.linspace(1e-4, 0.02, 1000)
PAIRS = [  # teacher and fake score, of one parametrization and of two
    ("eps", "eps", VP(BETAS)),
    ("v", "v", Cosine()),
    ("v", "x0", Cosine()),
    ("flow", "eps", RectifiedFlow()),
    ("edm", "edm", EDM()),
    ("edm", "x0", EDM()),
]


def denoiser(parametrization, schedule, seed, classes=0, **options):
    sigma_data = {"sigma_data": 0.5} if parametrization == "edm" else {}
    return Denoiser(Mlp(seed=seed, classes=classes), schedule, parametrization, **sigma_data, **options)


def networks(teacher="v", fake_score="v", schedule=None, classes=0, **options):
    """Generator, teacher and fake score, all different."""
    schedule = schedule or Cosine()
    t_star = float(schedule.t_from_log_snr(torch.tensor([-1.0])))
    return (
        Generator(denoiser(teacher, schedule, 1, classes), t_star),
        denoiser(teacher, schedule, 2, classes, **options),
        denoiser(fake_score, schedule, 3, classes),
    )


def inputs(batch=5, seed=0, schedule=None):
    g = seeded(seed)
    t = (schedule or Cosine()).t_from_log_snr(4 * torch.rand(batch, generator=g) - 2)
    return torch.randn(batch, 3, generator=g), torch.randn(batch, 3, generator=g), t


def plainly(
    generator, teacher, fake_score, z, eps, t, draw, *, cond=None, null=None, guidance=None, steps, gamma_eps, gamma_z
):
    """Section 1, line by line, in the dtype of z; draw(stream, k) gives the noise."""
    alpha, sigma = (column(f(t.float()).to(z.dtype), z) for f in (teacher.schedule.alpha, teacher.schedule.sigma))
    gamma_eps, gamma_z, w = (column(g, z) if isinstance(g, torch.Tensor) else g for g in (gamma_eps, gamma_z, guidance))
    drift = torch.zeros_like(eps)
    for k in range(steps):
        latent = z.detach().requires_grad_()
        g = generator(latent, cond)
        x = (alpha * g + sigma * eps).detach()
        with torch.no_grad():
            F = teacher(x, t, cond)
            if w is not None:
                F_u = teacher(x, t, null)
                F = F_u + w * (F - F_u)
            a, b = (column(c.to(z.dtype), z) for c in teacher.score_coefficients(t))
            s_teacher = a * x + b * F
            a, b = (column(c.to(z.dtype), z) for c in fake_score.score_coefficients(t))
            delta = s_teacher - (a * x + b * fake_score(x, t, cond))
        (z_grad,) = torch.autograd.grad(g, latent, alpha * delta)
        drift = (1 - gamma_eps) * drift + gamma_eps * sigma * delta
        eps = eps + gamma_eps * (sigma * delta - eps) + (2 * gamma_eps) ** 0.5 * draw(2, k)
        z = z + gamma_z * (z_grad - z) + (2 * gamma_z) ** 0.5 * draw(3, k)
    return z, eps, drift


def check_against_float64(run, nets, z, eps, t, where, **options):
    noise = Noise(**where)
    result = run(*nets, z, eps, t, noise=noise, **{k: v for k, v in options.items() if k != "null"})
    offset = where.pop("substep", 0)
    draws = [
        (lambda stream, k, d=d: normals(tuple(z.shape), stream=stream, substep=k + offset, **where).to(d))
        for d in (torch.float64, torch.float32)
    ]
    wide = [copy.deepcopy(net).double() for net in nets]
    as_double = {
        k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()
    }
    exact = plainly(*wide, z.double(), eps.double(), t, draws[0], **as_double)
    eager = plainly(*nets, z.float(), eps.float(), t, draws[1], **options)
    for what, mine, truth, its in zip(
        ("z", "eps", "drift"), (result.z, result.eps, result.drift), exact, eager, strict=True
    ):
        assert mine.dtype == torch.float32 and mine.is_contiguous()
        # The contract's error of a normal number, a few times over in a chain of some steps.
        assert_as_good_as_eager(mine, truth, its, more=3e-5, what=what)
    return result


@pytest.mark.parametrize(("teacher", "fake_score", "schedule"), PAIRS, ids=str)
@pytest.mark.parametrize("gamma_z", [0.0, 0.03])
def test_against_float64(backend, teacher, fake_score, schedule, gamma_z):
    z, eps, t = inputs(schedule=schedule)
    nets = networks(teacher, fake_score, schedule)
    where = {"seed": 3, "step": 7, "first_sample": 11}
    result = check_against_float64(e_step, nets, z, eps, t, where, steps=4, gamma_eps=0.16, gamma_z=gamma_z)
    assert_same(result.alpha, schedule.alpha(t))
    assert_same(result.sigma, schedule.sigma(t))
    assert_same(result.t, t)


def test_step_sizes_and_guidance_by_sample(backend):
    z, eps, t = inputs()
    labels = torch.tensor([0, 1, 2, 3, 4])
    g = seeded(1)
    sizes = {"gamma_eps": 0.05 + 0.5 * torch.rand(5, generator=g), "gamma_z": 0.05 * torch.rand(5, generator=g)}
    for guidance in (None, 2.0, torch.tensor([0.0, 1.0, 2.0, 3.0, 7.0])):
        check_against_float64(
            e_step, networks(classes=6, null_cond=5), z, eps, t, {"seed": 1}, steps=3, cond=labels,
            null=torch.full((5,), 5), guidance=guidance, **sizes,
        )  # fmt: skip


def test_a_pytree_and_a_null_condition_of_the_call(backend):
    z, eps, t = inputs()
    cond = {"label": torch.tensor([0, 1, 2, 3, 4]), "extra": (torch.randn(5, 2),)}
    null = {"label": torch.full((5,), 5), "extra": (torch.zeros(5, 2),)}
    nets = networks(classes=6)
    options = {"steps": 2, "gamma_eps": 0.1, "gamma_z": 0.01, "cond": cond, "guidance": 3.0}
    given = e_step(*nets, z, eps, t, noise=Noise(0), null_cond=null, **options)
    one = {"label": torch.tensor([5]), "extra": (torch.zeros(1, 2),)}
    assert_same(e_step(*nets, z, eps, t, noise=Noise(0), null_cond=one, **options).z, given.z)
    assert given.cond is cond
    exact = check_against_float64(
        lambda *a, **k: e_step(*a, null_cond=null, **k), nets, z, eps, t, {"seed": 0}, null=null, **options
    )
    assert_same(exact.z, given.z)


def test_the_substep_of_the_noise_is_added(backend):
    z, eps, t = inputs()
    check_against_float64(
        e_step, networks(), z, eps, t, {"seed": 5, "substep": 9}, steps=2, gamma_eps=0.1, gamma_z=0.01
    )


def test_a_split_batch_is_the_whole(backend):
    z, eps, t = inputs()
    nets, options = networks(), {"steps": 3, "gamma_eps": 0.1, "gamma_z": 0.02}
    whole = e_step(*nets, z, eps, t, noise=Noise(0, first_sample=4), **options)
    parts = [
        e_step(*nets, z[s], eps[s], t[s], noise=Noise(0, first_sample=4 + s.start), **options)
        for s in (slice(0, 2), slice(2, 5))
    ]
    for what in ("z", "eps", "drift"):
        # The networks' own matrix products may differ in the last bit with the batch.
        assert_within(torch.cat([getattr(p, what) for p in parts]), getattr(whole, what), 1e-5, what)


def test_an_empty_batch(backend):
    z, eps, t = inputs()
    result = e_step(*networks(), z[:0], eps[:0], t[:0], steps=2, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    assert result.z.shape == (0, 3) and result.drift.shape == (0, 3)
    labels = torch.zeros(0, dtype=torch.int64)
    nets = networks(classes=6, null_cond=5)
    e_step(*nets, z[:0], eps[:0], t[:0], cond=labels, guidance=2.0, steps=1, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))


def test_nothing_that_is_given_changes(backend):
    z, eps, t = inputs()
    nets = networks()
    for net in nets:
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)
    next(nets[0].parameters()).requires_grad_(False)
    kept = [z.clone(), eps.clone(), t.clone()]
    weights = [p.clone() for net in nets for p in net.parameters()]
    asked = [p.requires_grad for net in nets for p in net.parameters()]
    result = e_step(*nets, z, eps, t, steps=3, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    for now, before in zip((z, eps, t), kept, strict=True):
        assert_same(now, before)
    for p, before, flag in zip([p for net in nets for p in net.parameters()], weights, asked, strict=True):
        assert_same(p, before)
        assert p.requires_grad == flag and bool((p.grad == 7).all())
    for value in (result.z, result.eps, result.drift):
        assert not value.requires_grad


def test_latents_that_require_gradients_are_left_alone(backend):
    z, eps, t = inputs()
    z.requires_grad_()
    result = e_step(*networks(), z, eps.requires_grad_(), t, steps=1, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    assert z.grad is None and not result.z.requires_grad


def test_inside_no_grad_and_inference_of_the_caller(backend):
    z, eps, t = inputs()
    options = {"steps": 2, "gamma_eps": 0.1, "gamma_z": 0.1}
    expected = e_step(*networks(), z, eps, t, noise=Noise(0), **options)
    with torch.no_grad():
        assert_same(e_step(*networks(), z, eps, t, noise=Noise(0), **options).z, expected.z)


def test_layout_and_dtype_of_the_latents_do_not_matter(backend):
    z, eps, t = inputs()
    options = {"steps": 2, "gamma_eps": 0.1, "gamma_z": 0.1}
    expected = e_step(*networks(), z, eps, t, noise=Noise(0), **options)
    strided = torch.stack([z, eps], dim=2)
    assert_same(e_step(*networks(), strided[..., 0], strided[..., 1], t, noise=Noise(0), **options).z, expected.z)
    assert_same(e_step(*networks(), z.double(), eps.double(), t, noise=Noise(0), **options).z, expected.z)


def test_reduced_precision_networks(backend):
    z, eps, t = inputs()
    nets = [net.bfloat16() for net in networks()]
    result = e_step(*nets, z, eps, t, steps=2, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    expected = e_step(*networks(), z, eps, t, steps=2, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    assert result.z.dtype == torch.float32
    assert_within(result.drift, expected.drift, 0.1)  # 8 bits: a coarse agreement


class Broken(nn.Module):
    def __init__(self, generator, after):
        super().__init__()
        self.generator, self.left = generator, after

    def forward(self, z, cond=None):
        self.left -= 1
        if self.left < 0:
            raise KeyError("broken")
        return self.generator(z, cond)


@pytest.mark.parametrize("run", [e_step, e_step_xz])
@pytest.mark.parametrize("after", [0, 1])
def test_flags_are_restored_after_an_exception(run, after):
    z, eps, t = inputs()
    generator, teacher, fake_score = networks()
    broken = Broken(generator, after)
    generator.denoiser.network.first.bias.requires_grad_(False)
    asked = [p.requires_grad for p in broken.parameters()]
    with pytest.raises(KeyError):
        run(broken, teacher, fake_score, z, eps, t, steps=3, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    assert [p.requires_grad for p in broken.parameters()] == asked


class Conv(nn.Module):
    """(B, 3, 8, 8) to itself; the first layer is wide, so that weight gradients would cost as much as the forward."""

    def __init__(self, seed):
        super().__init__()
        layers = [
            nn.Conv2d(3, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 3, 3, padding=1),
        ]
        self.layers = nn.Sequential(*layers)
        randomised(self, seed)

    def forward(self, x, t, cond=None):
        return self.layers(x)


def images():
    g = seeded(0)
    schedule = Cosine()
    nets = (
        Generator(Denoiser(Conv(1), schedule, "v"), 0.8),
        Denoiser(Conv(2), schedule, "v"),
        Denoiser(Conv(3), schedule, "v"),
    )
    return nets, (torch.randn(2, 3, 8, 8, generator=g), torch.randn(2, 3, 8, 8, generator=g), torch.tensor([0.3, 0.7]))


class Flops(TorchDispatchMode):
    """FlopCounterMode without its account by module, which autograd.grad does not bear; `without` some ops."""

    def __init__(self, without=()):
        super().__init__()
        self.total, self.without = 0, without

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry and func._overloadpacket not in self.without:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


class TestWork:
    def test_flops_of_the_backward_pass_in_eager_code(self):
        (generator, teacher, fake_score), latents = images()
        with Flops() as forward:
            generator(latents[0])
        flops = {}
        for gamma_z in (0.0, 0.1):
            with Flops() as counter:
                e_step(
                    generator, teacher, fake_score, *latents, steps=3, gamma_eps=0.1, gamma_z=gamma_z, noise=Noise(0)
                )
            flops[gamma_z] = counter.total
        one = forward.total
        # 3 passes of teacher and fake score and one of the generator; or as many of it as steps, and backward.
        assert flops[0.0] == (2 * 3 + 1) * one
        backward = (flops[0.1] - (2 * 3 + 3) * one) / 3
        assert 0.9 * one <= backward <= 1.1 * one

    def test_flops_of_the_backward_pass_in_compiled_code(self):
        from torch._dynamo.backends.common import aot_autograd

        counted = {"forward": 0, "backward": 0}

        def counting(name):
            def compile(graph, example_inputs):
                for node in graph.graph.nodes:
                    packet = getattr(node.target, "overloadpacket", None)
                    if packet in flop_registry:
                        values, keywords = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
                        counted[name] += flop_registry[packet](*values, **keywords, out_val=node.meta["val"])
                return graph.forward

            return compile

        (generator, teacher, fake_score), latents = images()
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"))
        compiled = torch.compile(generator, fullgraph=True, backend=backend)
        options = {"steps": 2, "gamma_eps": 0.1, "gamma_z": 0.1}
        expected = e_step(generator, teacher, fake_score, *latents, noise=Noise(0), **options)
        result = e_step(compiled, teacher, fake_score, *latents, noise=Noise(0), **options)
        assert_within(result.z, expected.z, 1e-5)
        assert counted["forward"] > 0
        assert 0.9 * counted["forward"] <= counted["backward"] <= 1.1 * counted["forward"]

    @pytest.mark.parametrize("gamma_z", [0.0, 0.1])
    def test_memory_does_not_grow_with_steps(self, gamma_z):
        """Counted at the generator's calls: what autograd holds, and which tensors of a step are still alive."""
        import gc
        import weakref

        (generator, teacher, fake_score), latents = images()
        alive, seen, most = [], [], 0

        def recording(z, cond=None):
            nonlocal most
            gc.collect()
            most = max(most, sum(ref() is not None for ref in alive))
            x = generator(z, cond)
            alive.append(weakref.ref(x))
            seen.append(x.requires_grad)
            return x

        for steps in (2, 8):
            alive.clear()
            e_step(
                recording, teacher, fake_score, *latents, steps=steps, gamma_eps=0.1, gamma_z=gamma_z, noise=Noise(0)
            )
            assert most <= 1  # the graph of the step before may live until it is replaced
        assert len(alive) == (8 if gamma_z else 1)

    def test_saved_activations_do_not_pile_up(self):
        (generator, teacher, fake_score), latents = images()
        now, peak = 0, {}

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
                e_step(
                    generator, teacher, fake_score, *latents, steps=steps, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0)
                )
        assert peak[1] > 0 and peak[8] <= peak[2] <= 2 * peak[1]

    def test_teacher_and_fake_score_run_once_a_step_without_gradients(self):
        calls = []
        (generator, teacher, fake_score), latents = images()
        for name, net in (("teacher", teacher), ("fake_score", fake_score)):
            net.register_forward_hook(lambda m, a, out, name=name: calls.append((name, out.requires_grad)))
        e_step(generator, teacher, fake_score, *latents, steps=2, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
        assert calls == [("teacher", False), ("fake_score", False)] * 2


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    path = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(how, net):
    if how == "ddp":
        return DistributedDataParallel(net)
    if how == "compiled":
        return torch.compile(net, backend="aot_eager", dynamic=False)
    if how == "compiled ddp":
        return torch.compile(DistributedDataParallel(net), backend="aot_eager", dynamic=False)
    return DistributedDataParallel(torch.compile(net, backend="aot_eager", dynamic=False))


@pytest.mark.parametrize("how", ["ddp", "compiled", "ddp of compiled", "compiled ddp"])
def test_wrapped_networks(one_process, how):
    """All three wrapped; twice, with an update of the generator between, as a trainer does it."""
    z, eps, t = inputs()
    torch._dynamo.reset()
    bare, nets = networks(), networks()
    outer = [wrapped(how, net) for net in nets]
    options = {"steps": 2, "gamma_eps": 0.2, "gamma_z": 0.05}
    for step in range(2):
        results = [e_step(*group, z, eps, t, noise=Noise(0, step=step), **options) for group in (bare, outer)]
        for what in ("z", "eps", "drift"):
            assert_within(getattr(results[1], what), getattr(results[0], what), 1e-5, what)
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
    schedule = Cosine()
    inner = DistributedDataParallel(Mlp(seed=1))
    generator = Generator(Denoiser(inner, schedule, "v"), 0.8)
    _, teacher, fake_score = networks()
    for step in range(2):
        result = e_step(
            generator, teacher, fake_score, z, eps, t, steps=2, gamma_eps=0.2, gamma_z=0.05, noise=Noise(0, step)
        )
        m_step(generator, result, torch.ones(5)).mean().backward()
    assert all(p.grad is not None for p in inner.parameters())


def test_sharded_networks(one_process):
    """FSDP2 keeps what it finds in its parameters at the first pass, which is the frozen one of the E-step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    z, eps, t = inputs()
    bare, nets = networks(), networks()
    mesh = init_device_mesh("cpu", (1,))
    for net in nets:
        fully_shard(net.network if isinstance(net, Denoiser) else net.denoiser.network, mesh=mesh)
        fully_shard(net, mesh=mesh)
    for step in range(2):
        results = [
            e_step(*group, z, eps, t, steps=2, gamma_eps=0.2, gamma_z=0.05, noise=Noise(0, step=step))
            for group in (bare, nets)
        ]
        for what in ("z", "eps", "drift"):
            assert_within(getattr(results[1], what), getattr(results[0], what), 1e-5, what)
        for group, result in zip((bare, nets), results, strict=True):
            group[0].zero_grad()
            m_step(group[0], result, torch.ones(5)).mean().backward()
            fake_score_step(group[0], group[2], z, eps, t).mean().backward()
        for mine, its in zip(nets[0].parameters(), bare[0].parameters(), strict=True):
            assert mine.requires_grad
            assert_within(mine.grad.full_tensor(), its.grad, 1e-5 * (1 + float(its.grad.abs().max())))


def test_sharding_with_reduced_precision_keeps_float32_gradients(one_process):
    """bfloat16 compute, float32 reductions: also when the very first pass is the frozen one of the E-step."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    z, eps, t = inputs()
    generator, teacher, fake_score = networks()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(generator, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    result = e_step(generator, teacher, fake_score, z, eps, t, steps=2, gamma_eps=0.2, gamma_z=0.05, noise=Noise(0))
    m_step(generator, result, torch.ones(5)).mean().backward()
    assert {p.grad.dtype for p in generator.parameters()} == {torch.float32}


def test_any_callable_is_a_generator(backend):
    z, eps, t = inputs()
    matrix = torch.randn(3, 3, generator=seeded(2))
    _, teacher, fake_score = networks()
    result = e_step(
        lambda z, cond: z @ matrix, teacher, fake_score, z, eps, t, steps=1, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0)
    )
    assert bool(torch.isfinite(result.z).all())


def test_a_latent_of_another_shape_than_the_image(backend):
    """z is (B, 2), x (B, 3): the noises of both are drawn for their own shapes."""
    g = seeded(3)
    matrix, eps, t = torch.randn(2, 3, generator=g), torch.randn(4, 3, generator=g), torch.full((4,), 0.5)
    _, teacher, fake_score = networks()
    z = torch.randn(4, 2, generator=g)
    result = e_step(
        lambda z, cond: z @ matrix, teacher, fake_score, z, eps, t, steps=1, gamma_eps=0.1, gamma_z=0.04, noise=Noise(6)
    )
    x = column(teacher.schedule.alpha(t), eps) * (z @ matrix) + column(teacher.schedule.sigma(t), eps) * eps
    delta = teacher.score(x, t) - fake_score.score(x, t)
    z_grad = column(teacher.schedule.alpha(t), eps) * delta @ matrix.T
    expected = z + 0.04 * (z_grad - z) + math.sqrt(0.08) * normals((4, 2), seed=6, stream=3)
    assert_within(result.z, expected, 1e-4)


def bad_arguments():
    z, eps, t = inputs(2)
    nan = float("nan")
    labels = torch.tensor([0, 1])
    return {
        "z integer": ({"z": z.long()}, TypeError, "z"),
        "z number": ({"z": 1.0}, TypeError, "z"),
        "z without a batch": ({"z": torch.tensor(1.0)}, ValueError, "z"),
        "eps batch": ({"eps": torch.ones(3, 3)}, ValueError, "eps"),
        "eps without a batch": ({"eps": torch.tensor(1.0)}, ValueError, "eps"),
        "eps meta": ({"eps": eps.to("meta")}, ValueError, "eps"),
        "t shape": ({"t": t[:1]}, ValueError, "t"),
        "t 2-d": ({"t": t[:, None]}, ValueError, "t"),
        "t float64": ({"t": t.double()}, TypeError, "t"),
        "t number": ({"t": 0.5}, TypeError, "t"),
        "t NaN": ({"t": torch.tensor([0.5, nan])}, ValueError, "t"),
        "t outside": ({"t": torch.tensor([0.5, 1.5])}, ValueError, "t"),
        "t without noise": ({"t": torch.tensor([0.5, 0.0])}, ValueError, "sigma"),
        "t meta": ({"t": t.to("meta")}, ValueError, "t"),
        "steps 0": ({"steps": 0}, ValueError, "steps"),
        "steps negative": ({"steps": -1}, ValueError, "steps"),
        "steps float": ({"steps": 2.0}, TypeError, "steps"),
        "steps bool": ({"steps": True}, TypeError, "steps"),
        "steps beyond the substeps": ({"noise": Noise(0, substep=2**16 - 1)}, ValueError, "substep"),
        "gamma_eps 0": ({"gamma_eps": 0.0}, ValueError, "gamma_eps"),
        "gamma_eps 1": ({"gamma_eps": 1.0}, ValueError, "gamma_eps"),
        "gamma_eps NaN": ({"gamma_eps": nan}, ValueError, "gamma_eps"),
        "gamma_eps text": ({"gamma_eps": "0.1"}, TypeError, "gamma_eps"),
        "gamma_eps None": ({"gamma_eps": None}, TypeError, "gamma_eps"),
        "gamma_eps shape": ({"gamma_eps": torch.ones(3) / 2}, ValueError, "gamma_eps"),
        "gamma_eps float64": ({"gamma_eps": torch.ones(2).double() / 2}, TypeError, "gamma_eps"),
        "gamma_eps meta": ({"gamma_eps": torch.ones(2, device="meta")}, ValueError, "gamma_eps"),
        "gamma_eps with a 0": ({"gamma_eps": torch.tensor([0.1, 0.0])}, ValueError, "gamma_eps"),
        "gamma_eps with a NaN": ({"gamma_eps": torch.tensor([0.1, nan])}, ValueError, "gamma_eps"),
        "gamma_z negative": ({"gamma_z": -0.1}, ValueError, "gamma_z"),
        "gamma_z 1": ({"gamma_z": 1}, ValueError, "gamma_z"),
        "gamma_z with a 1": ({"gamma_z": torch.tensor([0.1, 1.0])}, ValueError, "gamma_z"),
        "gamma_z float64": ({"gamma_z": torch.zeros(2).double()}, TypeError, "gamma_z"),
        "guidance NaN": ({"guidance": nan, "cond": labels}, ValueError, "guidance"),
        "guidance text": ({"guidance": "2", "cond": labels}, TypeError, "guidance"),
        "guidance shape": ({"guidance": torch.ones(3), "cond": labels}, ValueError, "guidance"),
        "guidance float64": ({"guidance": torch.ones(2).double(), "cond": labels}, TypeError, "guidance"),
        "guidance without a null": ({"guidance": 2.0, "cond": labels}, ValueError, "null"),
        "guidance without a condition": ({"guidance": 2.0, "null_cond": 3}, ValueError, "cond"),
        "null of another structure": (
            {"guidance": 2.0, "cond": labels, "null_cond": {"a": labels}},
            ValueError,
            "null_cond",
        ),
        "cond batch": ({"cond": torch.zeros(3, dtype=torch.int64)}, ValueError, "cond"),
        "noise": ({"noise": 3}, TypeError, "noise"),
        "noise meta": ({"noise": Noise(0, device="meta")}, ValueError, "noise"),
        "teacher": ({"teacher": nn.Linear(1, 1)}, TypeError, "Denoiser"),
        "fake_score": ({"fake_score": lambda x, t, c: x}, TypeError, "Denoiser"),
        "two schedules": ({"fake_score": denoiser("eps", VP(BETAS), 3)}, ValueError, "schedule"),
    }


@pytest.mark.parametrize("run", [e_step, e_step_xz])
@pytest.mark.parametrize("name", bad_arguments())
def test_bad_input_raises_before_anything_is_computed(run, name):
    changed, error, named = bad_arguments()[name]
    z, eps, t = inputs(2)
    calls = []
    generator, teacher, fake_score = networks()
    for net in (generator, teacher, fake_score):
        net.register_forward_pre_hook(lambda *a: calls.append(a))
    given = {
        "generator": generator, "teacher": teacher, "fake_score": fake_score, "z": z, "eps": eps, "t": t,
        "steps": 2, "gamma_eps": 0.1, "gamma_z": 0.1, "noise": Noise(0), **changed,
    }  # fmt: skip
    with pytest.raises(error, match=naming(named)):
        run(**given)
    assert not calls


def test_a_generator_of_another_shape_is_named():
    z, eps, t = inputs()
    _, teacher, fake_score = networks()
    with pytest.raises(ValueError, match=r"eps must have shape \(5, 2\)"):
        e_step(
            lambda z, cond: z[:, :2],
            teacher,
            fake_score,
            z,
            eps,
            t,
            steps=1,
            gamma_eps=0.1,
            gamma_z=0.1,
            noise=Noise(0),
        )


def test_the_chosen_backend_serves_the_whole_step(monkeypatch, backend):
    used = set()
    original = emd_fast.backends.implementation
    monkeypatch.setattr(emd_fast.backends, "implementation", lambda op, b, d: used.add((op, b)) or original(op, b, d))
    z, eps, t = inputs()
    e_step(*networks(), z, eps, t, steps=1, gamma_eps=0.1, gamma_z=0.1, noise=Noise(0))
    assert used == {("perturb", backend), ("langevin_eps", backend), ("langevin_z", backend)}


class TestXz:
    """The ablation that moves x instead of eps."""

    def test_at_gamma_z_zero_it_is_the_same_chain(self):
        """With z at rest x = alpha g + sigma eps, and a step in x is the step in eps."""
        z, eps, t = inputs()
        options = {"steps": 4, "gamma_eps": 0.16, "gamma_z": 0.0}
        one = e_step(*networks(), z, eps, t, noise=Noise(2), **options)
        two = e_step_xz(*networks(), z, eps, t, noise=Noise(2), **options)
        for what in ("z", "eps", "drift"):
            assert_within(getattr(two, what), getattr(one, what), 5e-5, what)

    def test_against_float64(self):
        z, eps, t = inputs()
        nets = networks()
        where = {"seed": 4}
        sizes = {"gamma_eps": torch.linspace(0.1, 0.3, 5), "gamma_z": torch.linspace(0.0, 0.05, 5)}
        result = e_step_xz(*nets, z, eps, t, steps=3, noise=Noise(4), **sizes)
        generator, teacher, fake_score = (copy.deepcopy(net).double() for net in nets)
        alpha, sigma = (column(f(t).double(), z) for f in (Cosine().alpha, Cosine().sigma))
        g_e, g_z = (column(s.double(), z) for s in sizes.values())
        latent, noises, x = z.double(), eps.double(), None
        for k in range(3):
            latent = latent.detach().requires_grad_()
            mean = alpha * generator(latent)
            x = mean.detach() + sigma * eps if x is None else x
            residual = (x - mean.detach()) / sigma**2
            (pull,) = torch.autograd.grad(mean, latent, residual)
            with torch.no_grad():
                delta = teacher.score(x, t) - fake_score.score(x, t)
                n, m = normals((5, 3), stream=2, substep=k, **where), normals((5, 3), stream=3, substep=k, **where)
                x = x + g_e * sigma**2 * (delta - residual) + torch.sqrt(2 * g_e) * sigma * n
                noises = (1 - g_e) * noises + torch.sqrt(2 * g_e) * n
                latent = latent + g_z * (pull - latent) + torch.sqrt(2 * g_z) * m
        exact = (x - alpha * generator(latent)) / sigma
        for what, mine, truth in (
            ("z", result.z, latent),
            ("eps", result.eps, exact),
            ("drift", result.drift, exact - noises),
        ):
            assert_within(mine, truth, 2e-4, what)  # divided by sigma^2 and sigma, some 30 roundings

    @pytest.mark.parametrize("schedule", [EDM(), Cosine()], ids=repr)
    def test_stationary_law_on_gaussians(self, schedule):
        """x of the density q(x) / p(x) N(x; alpha g, sigma^2) N(z) has the law q, as g and N(z) integrate to p."""
        n, d = 8192, 2
        A = torch.tensor([[1.0, 0.4], [0.0, 0.7]])
        S = torch.tensor([[0.8, -0.2], [-0.2, 1.1]])
        t = schedule.t_from_log_snr(torch.zeros(1)).expand(n).contiguous()
        g = seeded(0)
        latents = torch.randn(n, d, generator=g), torch.randn(n, d, generator=g)
        result = e_step_xz(
            lambda z, cond: z @ A.T, gaussian(torch.zeros(d), S, schedule), gaussian(torch.zeros(d), A @ A.T, schedule),
            *latents, t, steps=150, gamma_eps=0.05, gamma_z=0.05, noise=Noise(0),
        )  # fmt: skip
        alpha, sigma = schedule.alpha(t[:1]).item(), schedule.sigma(t[:1]).item()
        x = (alpha * result.z @ A.T + sigma * result.eps).double()
        q = (alpha**2 * S + sigma**2 * torch.eye(d)).double()
        whitener = torch.linalg.inv(torch.linalg.cholesky(q))
        covariance = torch.cov((x @ whitener.T).T, correction=0)
        # Five standard errors sqrt(2 / n), and a bias of gamma lambda / 2 with lambda at most 3 here.
        assert_within(covariance, torch.eye(d, dtype=torch.float64), 5 * math.sqrt(2 / n) + 0.05 * 3 / 2)
