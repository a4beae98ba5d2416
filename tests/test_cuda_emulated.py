"""The CUDA kernels of csrc/cuda, built by a C++ compiler and run on CPU tensors (tests/cuda_emulator): every index,
stride, vector and tail, and the order of every sum. What they compute must be what the CPU kernels compute, to the last
bit, for both take their formulas from csrc/core; test_native.py and the tests of the ops say what those are worth.
group_norm has formulas of its own on a GPU: test_cuda_group_norm.py."""

import kernel_cases
import pytest
import torch
from cuda_objects import tool
from helpers import DTYPES, assert_all_same, assert_same, draw, per_sample, seeded

from emd_fast import Noise
from emd_fast.backends import native

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(native.why_not("normal", "cpu") is not None, reason=str(native.why_not("normal", "cpu"))),
    pytest.mark.skipif(tool("cmake") is None or tool("c++") is None, reason="no cmake or no C++ compiler"),
]


def assert_equal(emulated, op, *arguments):
    runs = (getattr(library, op) for library in (emulated, torch.ops.emd_fast_native))
    assert_all_same(*(kernel_cases.results(run, op, arguments, lambda value: value) for run in runs))


NOISE = Noise(**kernel_cases.NUMBERS).state


def test_every_op_is_compared():
    compared = {op for op, _ in kernel_cases.calls((2, 3), "contiguous")}
    assert compared == native.OPS - {"group_norm", "group_norm_backward"}


@pytest.mark.parametrize(("shape", "layout"), kernel_cases.cases(kernel_cases.SHAPES))
def test_every_op_equals_the_cpu_kernel(emulated, shape, layout):
    for op, arguments in kernel_cases.calls(shape, layout):
        if op in ("m_step_loss", "score_matching_loss"):  # sums in float32 here, in float64 there
            kernel_cases.assert_as_good_as_reference(getattr(emulated, op), op, arguments)
        else:
            assert_equal(emulated, op, *arguments)


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
            library.langevin_z(state, z_grad, 0.1, None, False, NOISE, 0)
        assert_same(found, expected)


def test_a_tensor_read_more_than_once_in_memory(emulated):
    g = seeded(3)
    one = draw((1, 3, 8, 8), g, torch.bfloat16).expand(4, 3, 8, 8)
    flat = draw((4, 1, 1, 1), g).expand(4, 3, 8, 8)
    for z_grad in (one, flat, one.float()[:, :, :1].expand(4, 3, 8, 8)):
        assert_equal(emulated, "langevin_z", draw((4, 3, 8, 8), g), z_grad, 0.1, None, False, NOISE, 0)
