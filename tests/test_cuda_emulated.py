"""The CUDA kernels of csrc/cuda, built by a C++ compiler and run on CPU tensors (tests/cuda_emulator): every index,
stride, vector and tail, and the order of every sum. What they compute must be what the CPU kernels compute, to the last
bit, for both take their formulas from csrc/core; test_native.py and the tests of the ops say what those are worth."""

from __future__ import annotations

import fcntl

import pytest
import torch
from cuda_objects import ROOT, cmake, tool, torch_paths
from helpers import DTYPES, assert_as_good_as_eager, assert_same, draw, per_sample, seeded

from emd_fast import Noise
from emd_fast.backends import native, reference

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(native.why_not("normal", "cpu") is not None, reason=str(native.why_not("normal", "cpu"))),
    pytest.mark.skipif(tool("cmake") is None or tool("c++") is None, reason="no cmake or no C++ compiler"),
]

# One element, fewer than a run, whole runs, odd, prime; rows of channels_last; more than one part of a sum.
SHAPES = [
    (3,), (7, 1), (300, 5), (2, 3, 8, 8), (2, 3, 7, 7), (2, 37, 6, 6), (1, 3, 37, 19), (2, 64, 4, 4), (3, 2, 3, 2, 5),
    (2, 1, 2, 3, 2, 2, 3, 2, 2), (2, 3, 128, 128), (1, 49999), (0, 3, 4, 4), (3, 0),
]  # fmt: skip
LAYOUTS = ["contiguous", "channels_last", "transposed", "sliced", "batch_last"]
CASES = [(s, x) for s in SHAPES for x in LAYOUTS if x in ("contiguous", "sliced") or len(s) == 4]


@pytest.fixture(scope="module")
def emulated():
    """The ops of emd_fast_native as the CUDA kernels compute them."""
    native.load()
    build = (
        ROOT / "build" / f"cuda-emulator-torch{torch.__version__}"
    )  # kept, so that the next run compiles what changed
    build.parent.mkdir(exist_ok=True)
    with open(f"{build}.lock", "w") as lock:  # another worker may be about to build it
        fcntl.flock(lock, fcntl.LOCK_EX)
        cmake(ROOT / "tests" / "cuda_emulator", build, *torch_paths())
    library = torch.library.Library("emd_fast_emulated", "DEF")
    for op in ours():
        library.define(str(getattr(torch.ops.emd_fast_native, op).default._schema).removeprefix("emd_fast_native::"))
    torch.ops.load_library(build / "libemulated.so")
    yield torch.ops.emd_fast_emulated
    library._destroy()


def ours() -> list[str]:
    return sorted(native.CUDA_OPS)


def both(emulated, op, *arguments):
    """What the two compute: the results, and the arguments that were written."""
    results = []
    for library in (emulated, torch.ops.emd_fast_native):
        given = [a.clone() if isinstance(a, torch.Tensor) and i < 2 and op[:8] == "langevin" else a
                 for i, a in enumerate(arguments)]  # fmt: skip
        result = getattr(library, op)(*given)
        written = given[: 2 if op == "langevin_eps" else 1 if op == "langevin_z" else 0]
        results.append([*written, *([] if result is None else [result])])
    return results


def assert_equal(emulated, op, *arguments):
    found, expected = both(emulated, op, *arguments)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


NOISE = Noise(0x123456789ABCDEF, step=3, first_sample=1000, substep=2).state


def test_every_op_is_there(emulated):
    for op in ours():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"emd_fast_emulated::{op}", "CPU"), op


@pytest.mark.parametrize("shape", SHAPES)
def test_noise(emulated, shape):
    assert_equal(emulated, "uniform", list(shape), NOISE, 65535, 1)
    for dtype in DTYPES:
        assert_equal(emulated, "normal", list(shape), NOISE, 6, 1, dtype)


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_perturb(emulated, shape, layout):
    g = seeded(0)
    for dtype in DTYPES:
        x0, eps = draw(shape, g, dtype, layout), draw(shape, g, torch.float32, layout)
        alpha, sigma = per_sample(shape[0], g), per_sample(shape[0], g)
        for out in (dtype, torch.float32):
            assert_equal(emulated, "perturb", x0, alpha, sigma, None, NOISE, 5, 0, out)
            assert_equal(emulated, "perturb", x0, alpha, sigma, eps, None, 0, 0, out)


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_langevin_eps(emulated, shape, layout, terms):
    g = seeded(terms)
    batch = shape[0]
    for dtype, sizes in (
        (torch.float32, None),
        (torch.bfloat16, per_sample(batch, g, 0.0, 1.0)),
        (torch.float16, None),
    ):
        x = draw(shape, g, torch.float32, layout) if terms == 5 else None
        outputs = [draw(shape, g, dtype, layout) for _ in range(terms - (x is not None))]
        if terms == 3:  # not all of one layout and type
            outputs[1] = draw(shape, g, torch.float32, "contiguous")
        coefs = torch.randn(terms, batch, generator=g).T
        state = [draw(shape, g), draw(shape, g), x, outputs, coefs, per_sample(batch, g), per_sample(batch, g)]
        assert_equal(emulated, "langevin_eps", *state, 0.3, sizes, NOISE, 7, dtype)


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_langevin_z(emulated, shape, layout):
    g = seeded(0)
    for dtype in DTYPES:
        for sizes in (None, per_sample(shape[0], g, 0.0, 1.0)):
            assert_equal(emulated, "langevin_z", draw(shape, g), draw(shape, g, dtype, layout), 0.01, sizes, NOISE, 7)


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_losses(emulated, shape, layout):
    g = seeded(0)
    a, b, c, d = (per_sample(shape[0], g) for _ in range(4))
    for dtype in DTYPES:
        output, x0 = draw(shape, g, dtype, layout), draw(shape, g, torch.float32, layout)
        x_t, drift = draw(shape, g, dtype, "contiguous"), draw(shape, g)
        assert_equal(emulated, "m_step_loss_backward", a, drift, b, c, d, dtype)
        assert_equal(emulated, "score_matching_loss_backward", a, output, x0, x_t, b, c, d)
        # Sums in float32 here, in float64 there: as good as eager PyTorch.
        for op, values in (
            ("m_step_loss", (output, drift, a, b, c)),
            ("score_matching_loss", (output, x0, x_t, a, b, c)),
        ):
            found = getattr(emulated, op)(*values)
            exact, eager = reference.OPS[op](*(v.double() for v in values)), reference.OPS[op](*values)
            assert found.shape == (shape[0],) and found.dtype == torch.float32
            assert_as_good_as_eager(found, exact, eager, what=f"{op} {dtype}")


@pytest.mark.parametrize("size", [(5,), (1000,), (2049,), (3, 70, 71), (3, 128, 129)])
def test_a_sum_is_the_same_in_every_batch(emulated, size):
    g = seeded(1)
    output, x0, x_t = (draw((5, *size), g) for _ in range(3))
    numbers = [per_sample(5, g) for _ in range(3)]
    whole = emulated.score_matching_loss(output, x0, x_t, *numbers)
    for i in range(5):
        alone = emulated.score_matching_loss(*(v[i : i + 1] for v in (output, x0, x_t, *numbers)))
        assert torch.equal(alone, whole[i : i + 1])


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_what_is_not_aligned_is_read_all_the_same(emulated, offset):
    shape, g = (3, 4, 8, 8), seeded(2)
    n = 3 * 4 * 8 * 8
    for dtype in DTYPES:
        z_grad = draw((n + offset,), g, dtype)[offset:].view(shape)
        z = draw((n + offset,), g)[offset:].view(shape)
        found, expected = torch.empty(2, n + offset)[:, offset:].unflatten(1, shape)
        for library, state in ((emulated, found), (torch.ops.emd_fast_native, expected)):
            state.copy_(z)
            library.langevin_z(state, z_grad, 0.1, None, NOISE, 0)
        assert_same(found, expected)


def test_a_tensor_read_more_than_once_in_memory(emulated):
    g = seeded(3)
    one = draw((1, 3, 8, 8), g, torch.bfloat16).expand(4, 3, 8, 8)
    flat = draw((4, 1, 1, 1), g).expand(4, 3, 8, 8)
    for z_grad in (one, flat, one.float()[:, :, :1].expand(4, 3, 8, 8)):
        assert_equal(emulated, "langevin_z", draw((4, 3, 8, 8), g), z_grad, 0.1, None, NOISE, 0)
