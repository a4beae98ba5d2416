"""Replacement of the noise generator for noiseless.py. Import it only if Triton is installed."""

import triton
import triton.language as tl


@triton.jit
def zeros(noise, stream, substep, sample, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """Returns zeros; has the signature of `normals` in emd_fast/backends/triton/philox.py."""
    return tl.zeros([ROWS, COLUMNS], tl.float32)
