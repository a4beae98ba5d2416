import numpy as np
import pytest
import torch
from helpers import integers, shapes
from hypothesis import given
from hypothesis import strategies as st

import emd_fast
from emd_fast import Noise, ops


@given(size=shapes(), high=st.one_of(st.integers(1, 20), st.integers(1, 2**31)))
def test_the_words_scaled_down(size, high):
    n = ops.integers(high, size, Noise(3, step=1), stream=8, substep=2)
    assert n.dtype == torch.int64 and n.shape == size
    assert np.array_equal(n.numpy(), integers(high, size, seed=3, step=1, stream=8, substep=2))


def test_all_values_below_high_occur_equally_often():
    counts = torch.bincount(ops.integers(10, (4, 25_000), Noise(5), stream=8).flatten(), minlength=10)
    # Chi-squared with 9 degrees of freedom exceeds 33.7 with probability 1e-4.
    assert ((counts - 1e4) ** 2 / 1e4).sum() < 33.7 and len(counts) == 10


@pytest.mark.parametrize("high", [0, -1, 2**31 + 1])
def test_high_outside_its_range(high):
    with pytest.raises(ValueError, match="high"):
        ops.integers(high, (2,), Noise(0), stream=8)


@pytest.mark.parametrize("high", [2.0, True, None, "3"])
def test_high_of_another_type(high):
    with pytest.raises(TypeError, match="high"):
        ops.integers(high, (2,), Noise(0), stream=8)


def test_a_named_backend_without_it_raises():
    with emd_fast.use_backend("cpu"), pytest.raises(RuntimeError, match="integers"):
        ops.integers(5, (2,), Noise(0), stream=8)
