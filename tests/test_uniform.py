import numpy as np
import pytest
import torch
from helpers import noise_words, shapes, uniforms
from hypothesis import given

import emd_fast
from emd_fast import Noise, ops
from emd_fast.backends.reference.philox import to_uniform

# Where the words of seed 0, stream 0 are extreme: at least 2^32 - 128, which is 2^32 as a float32 (sample, element).
HIGHEST = [(477, 1045), (1146, 8926), (1229, 2648), (58585, 48)]


def test_bounds_at_extreme_words():
    words = torch.tensor([0, 1, 2**31, 2**32 - 385, 2**32 - 129, 2**32 - 128, 2**32 - 1])
    u = to_uniform(words)
    assert u[0] == 2.0**-33 and bool((u > 0).all())
    assert bool((u < 1).all()) and u[-1] == 1 - 2.0**-24


@pytest.mark.parametrize(("sample", "element"), HIGHEST)
def test_stays_below_one_where_the_word_rounds_up(backend, sample, element):
    assert noise_words((1, element + 1), first_sample=sample)[0][0, element] >= 2**32 - 400
    assert ops.uniform((1, element + 1), Noise(0, first_sample=sample), stream=0)[0, -1] == 1 - 2.0**-24


@given(size=shapes())
def test_any_size_to_the_last_bit(backend, size):
    u = ops.uniform(size, Noise(11, step=2), stream=6, substep=1)
    assert u.shape == size and u.is_contiguous()
    assert np.array_equal(u.numpy(), uniforms(size, seed=11, step=2, stream=6, substep=1))


@pytest.mark.parametrize("size", [(0,), (0, 3), (3, 0), (2, 0, 4)])
def test_empty(backend, size):
    assert ops.uniform(size, Noise(0), stream=0).shape == size


def test_size_may_be_a_torch_size_or_a_list(backend):
    x = torch.empty(2, 3)
    assert torch.equal(ops.uniform(x.shape, Noise(0), stream=0), ops.uniform([2, 3], Noise(0), stream=0))


def test_noise_on_another_device_decides():
    noise = Noise(0, device="meta")
    assert ops.uniform((2, 3), noise, stream=0).device.type == "meta"


def test_the_same_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.uniform((3, 100_003), Noise(4), stream=1)
        torch.set_num_threads(2)
        assert torch.equal(ops.uniform((3, 100_003), Noise(4), stream=1), one)
    finally:
        torch.set_num_threads(threads)


def test_auto_takes_a_backend_that_agrees():
    with emd_fast.use_backend("reference"):
        expected = ops.uniform((3, 33), Noise(1), stream=0)
    assert torch.equal(ops.uniform((3, 33), Noise(1), stream=0), expected)
