"""The ops on a GPU, by every backend that serves CUDA tensors there. Skipped where there is none."""

import kernel_cases
import pytest
import torch
from helpers import (
    DTYPES,
    NOISE_ERROR,
    assert_alike,
    assert_all_same,
    assert_as_good_as_eager,
    assert_same,
    assert_within,
    draw,
    normals,
    per_sample,
    randomised,
    seeded,
    uniforms,
)

import emd_fast
from emd_fast import Noise, ops

DEVICE = "cuda"
if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if reason := emd_fast.backends.why_not("normal", request.param, DEVICE):
        pytest.skip(reason)
    with emd_fast.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("shape", [s for s in kernel_cases.SHAPES if 0 not in s])
def test_the_noise_contract(backend, shape):
    where = kernel_cases.NUMBERS | {"stream": 9, "substep": 7}
    noise = Noise(**kernel_cases.NUMBERS, device=DEVICE)
    assert_same(ops.uniform(shape, noise, stream=9, substep=5).cpu(), torch.from_numpy(uniforms(shape, **where)))
    n = ops.normal(shape, noise, stream=9, substep=5)
    assert_within(n.cpu(), normals(shape, **where), NOISE_ERROR)
    for dtype in DTYPES[1:]:
        assert_same(ops.normal(shape, noise, stream=9, substep=5, dtype=dtype).cpu(), n.to(dtype).cpu())


@pytest.mark.parametrize(("shape", "layout"), kernel_cases.cases(kernel_cases.SHAPES))
def test_every_op_against_float64_and_the_reference(backend, shape, layout):
    for op, arguments in kernel_cases.calls(shape, layout):
        run = emd_fast.backends.implementation(op, backend, DEVICE)
        kernel_cases.assert_as_good_as_reference(run, op, arguments, DEVICE)


def test_a_sum_is_the_same_in_every_batch_and_every_run(backend):
    g = seeded(1)
    output, x0, x_t = (draw((5, 3, 70, 71), g).to(DEVICE) for _ in range(3))
    numbers = [per_sample(5, g).to(DEVICE) for _ in range(3)]
    whole = ops.score_matching_loss(output, x0, x_t, *numbers)
    assert torch.equal(ops.score_matching_loss(output, x0, x_t, *numbers), whole)
    for i in range(5):
        alone = ops.score_matching_loss(*(v[i : i + 1] for v in (output, x0, x_t, *numbers)))
        assert torch.equal(alone, whole[i : i + 1])


def test_equal_outputs_leave_no_drift(backend):
    g = seeded(2)
    for dtype in DTYPES:
        output = draw((64, 3, 64, 64), g, dtype).to(DEVICE)
        k, v = torch.randn(64, generator=g).to(DEVICE), per_sample(64, g).to(DEVICE)
        eps, drift = draw(output.shape, g).to(DEVICE), torch.zeros(output.shape, device=DEVICE)
        given = eps, drift, None, [output, output.clone()], torch.stack([k, -k], dim=1), v, v
        cotangent = ops.langevin_eps(*given, step_size=0.1, noise=Noise(0, device=DEVICE))
        assert not drift.any() and not cotangent.any()


def test_a_captured_graph_draws_new_noise(backend):
    noise, shape = Noise(5, device=DEVICE), (8, 3, 16, 16)
    z, z_grad = torch.zeros(shape, device=DEVICE), torch.zeros(shape, device=DEVICE)
    ones = torch.ones(8, device=DEVICE)

    def step():
        noise.advance()
        ops.langevin_z(z, z_grad, step_size=0.5, noise=noise)
        return ops.normal(shape, noise, stream=4), ops.perturb(z_grad, ones, ones, noise=noise, stream=5)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn, perturbed = step()
    noise.set(step=0)
    z.zero_()
    expected_z, eager = torch.zeros(shape, device=DEVICE), Noise(5, device=DEVICE)
    for _ in range(3):
        graph.replay()
        eager.advance()
        ops.langevin_z(expected_z, z_grad, step_size=0.5, noise=eager)
        perturb = ops.perturb(z_grad, ones, ones, noise=eager, stream=5)
        assert_all_same([z, drawn, perturbed], [expected_z, ops.normal(shape, eager, stream=4), perturb])


def test_compiled_code_equals_eager(backend):
    g, shape = seeded(3), (4, 3, 16, 16)
    outputs = [draw(shape, g, torch.bfloat16).to(DEVICE) for _ in range(2)]
    coefs, v = torch.randn(4, 2, generator=g).to(DEVICE), per_sample(4, g).to(DEVICE)
    noise = Noise(1, device=DEVICE)

    def step(eps, drift, z, substep):
        now = {"step_size": 0.1, "noise": noise, "substep": substep}
        ops.langevin_z(z, ops.langevin_eps(eps, drift, None, outputs, coefs, v, v, **now), **now)
        return ops.perturb(z, v, v, eps=eps)

    compiled = torch.compile(step, fullgraph=True)
    for substep in range(3):
        states = [[draw(shape, seeded(i)).to(DEVICE) for i in range(3)] for _ in range(2)]
        found, expected = compiled(*states[0], substep), step(*states[1], substep)
        assert_all_same([*states[0], found], [*states[1], expected])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_the_current_one(backend):
    noise = Noise(3, device="cuda:1")
    n = ops.normal((4, 1000), noise, stream=0)
    assert n.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_within(n.cpu(), normals((4, 1000), seed=3, stream=0), NOISE_ERROR)


def test_tensors_of_more_than_2_to_the_31_elements(backend):
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("a GPU with less than 40 GB")
    n = ops.normal((2**15 + 1, 2**16), Noise(7, device=DEVICE), stream=1, dtype=torch.bfloat16)
    with emd_fast.use_backend("reference"):
        tail = ops.normal((1, 2**16), Noise(7, first_sample=2**15), stream=1)
    assert_within(n[-1:].cpu(), tail, 2**-8 * 7)


def test_e_step_on_the_gpu_is_that_of_the_cpu(backend):
    schedule = emd_fast.diffusion.schedules.EDM()
    teacher = emd_fast.teachers.gaussian(torch.zeros(6), torch.eye(6), schedule)
    fake_score = emd_fast.teachers.gaussian(torch.ones(6), 2 * torch.eye(6), schedule)
    results = []
    for device in ("cpu", DEVICE):
        networks = [n.to(device) for n in (teacher, fake_score)]
        noise = Noise(2, device=device)
        with emd_fast.use_backend("reference" if device == "cpu" else backend):
            z, eps = (ops.normal((32, 6), noise, stream=s) for s in (0, 1))
            found = emd_fast.e_step(
                lambda z, cond=None: 0.5 * z, *networks, z, eps, torch.full((32,), 0.7, device=device), steps=4,
                gamma_eps=0.1, gamma_z=0.01, noise=noise,
            )  # fmt: skip
        results.append([found.z.cpu(), found.eps.cpu(), found.drift.cpu()])
    for ours, cpu in zip(*reversed(results), strict=True):
        assert_within(ours, cpu, 1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [
        ((2, 192, 16, 16), 32),
        ((2, 320, 64, 64), 32),
        ((3, 1152, 8, 8), 32),
        ((2, 6, 7, 5), 3),
        ((2, 12, 1, 1), 4),
        ((16, 192, 64, 64), 32),
        ((1, 32, 300, 301), 8),
    ],
)
@pytest.mark.parametrize("chosen", ["triton", "cuda"])
def test_group_norm(shape, groups, layout, chosen):
    if reason := emd_fast.backends.why_not("group_norm", chosen, DEVICE):
        pytest.skip(reason)
    if chosen == "cuda" and layout == torch.contiguous_format and shape[2:] != (1, 1):
        with emd_fast.use_backend("cuda"), pytest.raises(RuntimeError, match="channels_last"):
            ops.group_norm(torch.zeros(shape, device=DEVICE), groups)
        return
    g = seeded(5)
    for dtype in DTYPES:
        x, grad = (draw(shape, g, dtype, scale=2.0).contiguous(memory_format=layout) for _ in range(2))
        weight, bias = (torch.randn(shape[1], generator=g) for _ in range(2))
        add, scale, shift = (torch.randn(shape[:2], generator=g) for _ in range(3))
        arguments = [x, weight, bias, add, scale, shift]

        def plain(x, weight, bias, add, scale, shift):
            by_channel = [v[..., None, None].to(x.dtype) for v in (add, scale, shift)]
            normal = torch.nn.functional.group_norm(x + by_channel[0], groups, weight.to(x.dtype), bias.to(x.dtype))
            return torch.nn.functional.silu(normal * (1 + by_channel[1]) + by_channel[2])

        def fused(x, weight, bias, add, scale, shift):
            with emd_fast.use_backend(chosen):
                return ops.group_norm(x, groups, weight, bias, add=add, scale=scale, shift=shift, activation="silu")

        results = []
        for run, device, kind in ((fused, DEVICE, None), (plain, "cpu", torch.float64), (plain, "cpu", None)):
            values = [v.to(device, kind or v.dtype).requires_grad_() for v in arguments]
            y = run(*values)
            gradients = torch.autograd.grad(y, values, grad.to(device, y.dtype))
            results.append([v.detach().cpu() for v in (y, *gradients)])
        for i, (ours, exact, eager) in enumerate(zip(*results, strict=True)):
            assert_as_good_as_eager(ours, exact, eager, what=f"{dtype} {i}")


def added(x, skip, bias, skip_bias):
    return (x + skip + bias[:, None, None].to(x.dtype) + skip_bias[:, None, None].to(x.dtype)) * 0.7


def gated(packed):
    values, gates = packed.chunk(2, dim=-1)
    return values * torch.nn.functional.gelu(gates)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 320, 64, 64), (3, 192, 8, 8), (2, 6, 7, 5), (2, 12, 1, 1)])
def test_residual_and_geglu(shape, layout):
    if reason := emd_fast.backends.why_not("residual", "triton", DEVICE):
        pytest.skip(reason)
    g = seeded(6)
    for dtype in DTYPES:
        x, skip, grad = (draw(shape, g, dtype, scale=2.0).contiguous(memory_format=layout) for _ in range(3))
        vectors = [torch.randn(shape[1], generator=g) for _ in range(2)]
        tokens, of_tokens = draw((shape[0], 9, 2 * shape[1]), g, dtype), draw((shape[0], 9, shape[1]), g, dtype)
        for plain, op, arguments, cotangent in (
            (added, lambda *tensors: ops.residual(*tensors, scale=0.7), [x, skip, *vectors], grad),
            (gated, ops.geglu, [tokens], of_tokens),
        ):
            results = []
            for run, device, kind in ((op, DEVICE, None), (plain, "cpu", torch.float64), (plain, "cpu", None)):
                values = [v.to(device, kind or v.dtype).requires_grad_() for v in arguments]
                with emd_fast.use_backend("triton" if run is op else "auto"):
                    y = run(*values)
                gradients = torch.autograd.grad(y, values, cotangent.to(device, y.dtype))
                results.append([v.detach().cpu() for v in (y, *gradients)])
            for i, (ours, exact, eager) in enumerate(zip(*results, strict=True)):
                assert_as_good_as_eager(ours, exact, eager, what=f"{plain.__name__} {dtype} {i}")


def test_a_frozen_layer_norm_under_autocast():
    if reason := emd_fast.backends.why_not("group_norm", "triton", DEVICE):
        pytest.skip(reason)
    norm = torch.nn.Sequential(torch.nn.LayerNorm(320), torch.nn.GroupNorm(1, 320)).requires_grad_(False)
    torch.nn.init.normal_(norm[0].weight)
    fused = emd_fast.fuse(norm.to(DEVICE))[0]
    x, grad = (draw((2, 77, 320), seeded(i), torch.bfloat16, scale=3).to(DEVICE) for i in range(2))
    results = []
    for run, dtype in ((fused, torch.bfloat16), (None, torch.float64), (None, torch.float32)):
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=run is not None):
            if run is None:
                y = torch.nn.functional.layer_norm(leaf, (320,), fused.weight.to(dtype), fused.bias.to(dtype))
            else:
                y = run(leaf)
        assert y.dtype == dtype
        (of_x,) = torch.autograd.grad(y, leaf, grad.to(dtype))
        rounded = torch.float64 if dtype == torch.float64 else torch.bfloat16
        results.append([y.detach().to(rounded).cpu(), of_x.to(rounded).cpu()])
    for ours, exact, eager in zip(*results, strict=True):
        assert_as_good_as_eager(ours, exact, eager)


@pytest.mark.parametrize("head_dim", [40, 64, 72, 80, 128, 160, 256])
@pytest.mark.parametrize(("tokens", "keys"), [(256, 256), (1000, 77), (64, 64), (1, 333)])
def test_attention(head_dim, tokens, keys):
    if reason := emd_fast.backends.why_not("attention", "triton", DEVICE):
        pytest.skip(reason)
    g = seeded(6)
    for dtype in DTYPES:
        # Slices of a packed projection, read as they lie.
        q = draw((2, tokens, 3, 4, head_dim), g, dtype)[:, :, 0]
        k, v = draw((2, keys, 2, 4, head_dim), g, dtype).unbind(2)
        grad = draw((2, tokens, 4, head_dim), g, dtype)
        results = []
        for backend, device, kind in (
            ("triton", DEVICE, None), ("reference", "cpu", torch.float64), ("sdpa", DEVICE, None)
        ):  # fmt: skip
            values = [x.to(device, kind or x.dtype).requires_grad_() for x in (q, k, v)]
            heads_first = [x.transpose(1, 2) for x in values]
            plain = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2) if kind else None
            y = plain if kind else ops.attention(*values, backend=backend)
            gradients = torch.autograd.grad(y, values, grad.to(device, y.dtype))
            results.append([x.detach().cpu() for x in (y, *gradients)])
        for i, (ours, exact, eager) in enumerate(zip(*results, strict=True)):
            assert_as_good_as_eager(ours, exact, eager, what=f"{dtype} {i}")


@pytest.mark.parametrize("batch", [4, 64])
def test_the_e_step_as_a_graph_equals_eager(backend, batch):
    from emd_fast.em.cuda_graph import GraphedEStep, _say_once
    from emd_fast.teachers.small_unet import SmallUNet

    schedule = emd_fast.diffusion.schedules.EDM()
    made = [randomised(SmallUNet(3, num_classes=4), seed, scale=0.5) for seed in range(3)]
    options = {"sigma_data": 0.5, "sample_shape": (3, 16, 16)}
    three = [emd_fast.Denoiser(net, schedule, "edm", **options).to(DEVICE).eval() for net in made]
    generator = emd_fast.Generator(three.pop(), 1.0).to(DEVICE)
    settings = {"steps": 4, "gamma_eps": 0.1, "gamma_z": 0.01}
    noise = Noise(9, device=DEVICE)
    sample = GraphedEStep(generator, *three, noise=noise, **settings)
    _say_once.cache_clear()
    for step in range(3):
        noise.set(step=step)
        with torch.no_grad():
            for parameter in three[1].parameters():
                parameter.mul_(1.01)
        z, eps = (ops.normal((batch, 3, 16, 16), noise, stream=s) for s in (0, 1))
        t, cond = torch.full((batch,), 0.5 + 0.1 * step, device=DEVICE), torch.arange(batch, device=DEVICE) % 4
        found = sample(z, eps, t, cond)
        expected = emd_fast.e_step(generator, *three, z, eps, t, cond=cond, noise=noise, **settings)
        assert_alike(found, expected, 0.0)
    assert not sample._refused and len(sample._captured) == 1
