import pytest
import torch
from helpers import DTYPES, NOISE_ERROR, assert_same, assert_within, normals, shapes
from hypothesis import given

from emd_fast import Noise, ops


@given(size=shapes())
def test_within_the_contract_for_any_size(backend, size):
    n = ops.normal(size, Noise(11, step=2), stream=6, substep=1)
    assert n.is_contiguous() and n.dtype == torch.float32
    assert_within(n, normals(size, seed=11, step=2, stream=6, substep=1), NOISE_ERROR)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reduced_precision_is_the_float32_number_rounded_once(backend, dtype):
    wide = ops.normal((3, 1001), Noise(2), stream=0)
    assert_same(ops.normal((3, 1001), Noise(2), stream=0, dtype=dtype), wide.to(dtype))


# Samples and elements of seed 0, stream 0 whose uniform number is 1 - 2^-24: as a radius it gives almost 0, as an
# angle almost a full turn.
@pytest.mark.parametrize(("sample", "element"), [(477, 1045), (1146, 8926), (1229, 2648), (1458, 6281)])
def test_where_u_is_all_but_one(backend, sample, element):
    size, start = (1, element + 4), element - 4
    n = ops.normal(size, Noise(0, first_sample=sample), stream=0)[:, start:]
    assert_within(n, normals(size, first_sample=sample)[:, start:], NOISE_ERROR)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, "float32"])
def test_bad_dtype(dtype):
    with pytest.raises(TypeError, match="dtype"):
        ops.normal((2, 3), Noise(0), stream=0, dtype=dtype)


def test_the_same_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.normal((3, 100_003), Noise(4), stream=1)
        torch.set_num_threads(2)
        assert torch.equal(ops.normal((3, 100_003), Noise(4), stream=1), one)
    finally:
        torch.set_num_threads(threads)
