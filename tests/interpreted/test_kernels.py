"""The Triton kernels where the tests of the ops do not reach them."""

import pytest
import torch
from helpers import (
    DTYPES,
    NOISE_ERROR,
    assert_as_good_as_eager,
    assert_same,
    assert_within,
    column,
    draw,
    per_sample,
    seeded,
    uniforms,
)  # fmt: skip

import emd_fast
from emd_fast import Noise, ops
from emd_fast.backends import reference, triton
from emd_fast.backends.triton import launch

# One dimension, planes (channels_last, transposed), general strides, many samples a program, several tiles a sample.
SHAPES = [(3,), (7, 1), (300, 5), (2, 3, 8, 8), (2, 3, 7, 7), (2, 37, 6, 6), (1, 3, 37, 19), (3, 2, 3, 2, 5)]
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "batch_last"]
CASES = [(s, x) for s in SHAPES for x in LAYOUTS if x in ("contiguous", "sliced") or len(s) == 4]


@pytest.fixture
def wide(monkeypatch, shape):
    """Every other shape is counted as if its samples had more than 2^31 elements."""
    if SHAPES.index(shape) % 2:
        monkeypatch.setattr(launch, "_INT32", 0)


def arguments(shape, dtype, layout, by_sample=False, seed=0):
    g = seeded(seed)
    b = shape[0]
    return [
        draw(shape, g), draw(shape, g), draw(shape, g, torch.float32, layout),
        [draw(shape, g, dtype, layout), draw(shape, g, torch.float32, "contiguous")],
        torch.randn(b, 3, generator=g), per_sample(b, g), per_sample(b, g), 0.3,
        per_sample(b, g, 0.0, 1.0) if by_sample else None, Noise(5, step=2, first_sample=11, substep=4).state, 7, dtype,
    ]  # fmt: skip


def doubled(values):
    return [
        v.double() if isinstance(v, torch.Tensor) and v.dtype != torch.int64
        else [o.double() for o in v] if isinstance(v, list)
        else v for v in values
    ]  # fmt: skip


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_langevin_eps_against_float64_and_the_reference(shape, layout, wide):
    for dtype in (torch.float32, torch.bfloat16):
        values = arguments(shape, dtype, layout, by_sample=dtype != torch.float32)
        exact, eager = doubled(values), [v.clone() if i < 2 else v for i, v in enumerate(values)]
        exact[-1] = torch.float64
        results = [
            (run(*v), *v[:2])
            for run, v in (
                (triton.implementation("langevin_eps"), values),
                (reference.OPS["langevin_eps"], exact),
                (reference.OPS["langevin_eps"], eager),
            )
        ]
        for name, more, ours, right, theirs in zip(
            ("cotangent", "eps", "drift"), (0, 2 * NOISE_ERROR, 0), *results, strict=True
        ):
            assert_as_good_as_eager(ours, right, theirs, more=more, what=f"{name} {dtype}")


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_losses_against_float64_and_the_reference(shape, layout, wide):
    g = seeded(1)
    output, x0, x_t = (draw(shape, g, dtype, layout) for dtype in (torch.bfloat16, torch.float16, torch.float32))
    drift, (c, d, e) = draw(shape, g), (per_sample(shape[0], g) for _ in range(3))
    grad = torch.ones(()).expand(shape[0])
    for op, values in {
        "score_matching_loss": (output, x0, x_t, c, d, e),
        "score_matching_loss_backward": (grad, output, x0, x_t, c, d, e),
        "m_step_loss": (output, drift, c, d, e),
        "m_step_loss_backward": (grad, drift, c, d, e, torch.bfloat16),
    }.items():
        exact = reference.OPS[op](*[v.double() if isinstance(v, torch.Tensor) else torch.float64 for v in values])
        ours, eager = triton.implementation(op)(*values), reference.OPS[op](*values)
        assert ours.dtype == eager.dtype and ours.is_contiguous()
        assert_as_good_as_eager(ours, exact, eager, what=op)


@pytest.mark.parametrize("shape", SHAPES)
def test_words_bit_for_bit_and_normals(shape, wide):
    where = {"seed": 2**62 + 12345, "step": 2**32 - 1, "first_sample": 2**32 - shape[0], "substep": 65535}
    noise = Noise(**where).state
    assert_same(
        triton.implementation("uniform")(list(shape), noise, 65535, 0),
        torch.from_numpy(uniforms(shape, stream=65535, **where)),
    )
    for dtype in DTYPES:
        ours = triton.implementation("normal")(list(shape), noise, 65535, 0, dtype)
        right = reference.OPS["normal"](list(shape), noise, 65535, 0, torch.float32)
        assert_within(ours, right, 5e-6 if dtype == torch.float32 else 2.0**-8 * right.abs().double() + 5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backends_agree_bit_for_bit_where_two_terms_meet(dtype):
    results = []
    for name in ("langevin_eps", "reference"):
        values = arguments((3, 3, 9, 8), dtype, "channels_last")
        values[2], values[4] = None, values[4][:, 1:]
        run = triton.implementation("langevin_eps") if name == "langevin_eps" else reference.OPS["langevin_eps"]
        results.append((run(*values), values[1]))
    assert_same(results[0][0], results[1][0], "cotangent")
    assert_same(results[0][1], results[1][1], "drift")


@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
@pytest.mark.parametrize("with_x", [False, True])
def test_equal_outputs_in_different_layouts_give_exactly_nothing(outputs, with_x):
    g, shape = seeded(4), (3, 3, 8, 12)
    f = draw(shape, g, scale=100)
    terms = [f.contiguous(memory_format=torch.channels_last) if i % 2 else f.clone() for i in range(outputs + with_x)]
    k = torch.randn(3, generator=g) / 3e-3
    coefs = torch.zeros(3, len(terms))
    if len(terms) > 1:
        coefs[:, 0], coefs[:, -1] = k, -k
    eps, drift = draw(shape, g), torch.zeros(shape)
    x, rest = (terms[0], terms[1:]) if with_x else (None, terms)
    with emd_fast.use_backend("triton"):
        cotangent = ops.langevin_eps(eps, drift, x, rest, coefs, k.abs(), k.abs(), step_size=0.3, noise=Noise(1))
    assert not drift.any() and not cotangent.any()


def test_losses_are_the_same_in_every_batch():
    g = seeded(3)
    output, x0, x_t = (draw((4, 3, 50, 40), g, layout="channels_last") for _ in range(3))
    c = per_sample(4, g)
    run = triton.implementation("score_matching_loss")
    whole = run(output, x0, x_t, c, c, c)
    parts = [run(output[s], x0[s], x_t[s], c[s], c[s], c[s]) for s in (slice(0, 1), slice(1, 4))]
    assert_same(torch.cat(parts), whole)
    assert_same(run(output, x0, x_t, c, c, c), whole)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3, 0, 4)])
def test_nothing_to_do_launches_nothing(shape, monkeypatch):
    def refuse(*args):
        raise AssertionError("a launch")

    monkeypatch.setattr(launch, "submit", refuse)
    x, v, noise = torch.ones(shape), torch.ones(shape[0]), Noise(0)
    with emd_fast.use_backend("triton"):
        assert ops.uniform(shape, noise, stream=0).shape == ops.normal(shape, noise, stream=0).shape == shape
        assert ops.perturb(x, v, v, noise=noise, stream=0).shape == shape
        drift = x.clone()
        cotangent = ops.langevin_eps(x.clone(), drift, None, [x], v[:, None], v, v, step_size=0.1, noise=noise)
        assert cotangent.shape == shape
        ops.langevin_z(x.clone(), x, step_size=0.1, noise=noise)
        y = x.clone().requires_grad_()
        for loss in (ops.m_step_loss(y, x, v, v, v), ops.score_matching_loss(y, x, x, v, v, v)):
            assert loss.shape == v.shape and loss.isnan().all()  # a mean over nothing, as the reference has it
            torch.autograd.grad(loss.sum(), y)


def test_backward_is_served_by_the_backend_of_the_forward(monkeypatch):
    calls, submit = [], launch.submit
    monkeypatch.setattr(launch, "submit", lambda kernel, *args: (calls.append(kernel.__name__), submit(kernel, *args)))
    y, v = torch.ones(2, 3, requires_grad=True), torch.ones(2)
    with emd_fast.use_backend("triton"):
        loss = ops.m_step_loss(y, torch.ones(2, 3), v, v, v).sum()
    torch.autograd.grad(loss, y)
    assert calls == ["drift_squares_kernel", "weighted_mean_kernel", "m_step_loss_backward_kernel"]
    ops.normal((2, 3), Noise(0), stream=0)
    assert len(calls) == 3  # "auto" never takes the interpreter


def test_new_noise_through_the_tensor():
    noise = Noise(0)
    with emd_fast.use_backend("triton"):
        first = ops.normal((2, 5), noise, stream=1)
        noise.advance()
        second = ops.normal((2, 5), noise, stream=1)
    assert_within(second, reference.OPS["normal"]([2, 5], Noise(0, step=1).state, 1, 0, torch.float32), 5e-6)
    assert (first != second).all()


def test_langevin_z_and_perturb_at_any_strides():
    for shape in SHAPES:
        for layout in LAYOUTS if len(shape) == 4 else ["sliced"]:
            g = seeded(2)
            z, z_grad, s = draw(shape, g), draw(shape, g, torch.float16, layout), per_sample(shape[0], g, 0.0, 1.0)
            noise, before = Noise(3), z.clone()
            n = reference.OPS["normal"](list(shape), noise.state, 3, 2, torch.float32).double()
            exact = before + column(s, z).double() * (z_grad.double() - before) + (2 * column(s, z).double()).sqrt() * n
            triton.implementation("langevin_z")(z, z_grad, 0.0, s, noise.state, 2)
            assert_within(z, exact, 1e-5, f"z {shape} {layout}")
            x_t = triton.implementation("perturb")(z_grad, s, s, None, noise.state, 3, 2, torch.float32)
            assert_within(x_t, column(s, z).double() * (z_grad.double() + n), 1e-5, f"x_t {shape} {layout}")
            given = triton.implementation("perturb")(z_grad, s, s, n.float(), None, 0, 0, torch.float32)
            assert_within(given, x_t, 1e-5)


def test_tuning_takes_the_fastest_and_leaves_numbers_and_tensors_alone(monkeypatch):
    from emd_fast.backends.triton import tuning

    def seconds(call, device):
        call()
        timed.append(used[-1])
        return abs(timed[-1] - 2048) + 1  # the fastest is the one whose tile has 2048 elements

    pick, used, timed = launch.pick, [], []

    def picked(batch, sizes, *choice):
        used.append(choice[0])
        return pick(batch, sizes, *choice)

    g = seeded(5)
    eps, drift = draw((3, 300), g), draw((3, 300), g)
    output, v = draw((3, 300), g, torch.bfloat16, "sliced"), per_sample(3, g, 0.1, 1.0)
    noise, one = Noise(2), torch.ones(1).expand(3)

    def step(substep):
        state = eps.clone(), drift.clone()
        with emd_fast.use_backend("triton"):
            cotangent = ops.langevin_eps(
                *state,
                None,
                [output],
                v[:, None],
                v,
                one,
                step_size=v,
                noise=noise,
                substep=substep,
            )
        return *state, cotangent

    plain = step(0)
    monkeypatch.setattr(launch, "pick", picked)
    monkeypatch.setattr(tuning, "wanted", lambda device: True)
    monkeypatch.setattr(tuning, "_seconds", seconds)
    monkeypatch.setattr(tuning, "_chosen", {})
    for found, expected in zip(step(0), plain, strict=True):
        assert torch.equal(found, expected)
    assert timed == [tile for tile, _ in tuning.CANDIDATES] and used[-1] == 2048
    step(1)
    assert len(timed) == len(tuning.CANDIDATES)  # another substep is measured no second time
    with emd_fast.use_backend("triton"):
        ops.m_step_loss(eps, drift, v, v, v)
    assert len(timed) == len(tuning.CANDIDATES)  # a sum depends on its tiles, which stay as they are


def test_tuning_only_where_it_is_asked_for(monkeypatch):
    from emd_fast.backends.triton import tuning

    gpu, capturing = torch.device("cuda", 0), False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.delenv("EMD_FAST_AUTOTUNE", raising=False)
    assert not tuning.wanted(gpu)
    monkeypatch.setenv("EMD_FAST_AUTOTUNE", "1")
    assert tuning.wanted(gpu) and not tuning.wanted(torch.device("cpu"))
    capturing = True
    assert not tuning.wanted(gpu)
