"""Every op of a fast backend against float64, in all layouts and dtypes and in large tensors."""

import conftest
import kernel_cases
import pytest
from helpers import DTYPES

from emd_fast import backends

# The interpreter is slow: small shapes, and one dtype and number of terms at a time.
SHAPES = kernel_cases.SMALL if conftest.INTERPRETED else [s for s in kernel_cases.SHAPES if s != (64, 3, 64, 64)]


@pytest.mark.parametrize("backend", conftest.BACKENDS[-1:])
@pytest.mark.parametrize(("shape", "layout"), kernel_cases.cases(SHAPES))
def test_every_op_against_float64_and_the_reference(backend, shape, layout, monkeypatch):
    if reason := backends.why_not("normal", backend, "cpu"):
        pytest.skip(reason)
    index, some = SHAPES.index(shape), ()
    if backend == "triton":
        some = ([DTYPES[index % 3]], (3,))
        if index % 2:  # counted as if its samples had more than 2^31 elements
            monkeypatch.setattr("emd_fast.backends.triton.launch._INT32", 0)
    for op, arguments in kernel_cases.calls(shape, layout, *some):
        kernel_cases.assert_as_good_as_reference(backends.implementation(op, backend, "cpu"), op, arguments)
