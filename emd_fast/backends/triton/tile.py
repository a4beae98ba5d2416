"""Tile of a program: its samples and elements, and loads and stores at any strides.

A tensor is passed as a view (pointer, batch stride, strides), and a tensor (B,) or (B, k) as
(pointer, strides...). launch.py makes both. Triton turns strides of 1 into compile-time constants,
which makes contiguous tensors fast.
"""

import triton
import triton.language as tl


@triton.jit
def tile(
    batch,
    sizes,
    down,
    across,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PLANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Position of this program's tile.

    Returns:
        sample, a scalar or (ROWS, 1); row (ROWS, 1); column (1, COLUMNS); the first Philox block
        of each row; the mask (ROWS, COLUMNS).
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    start = program % across * COLUMNS
    column = start + tl.arange(0, COLUMNS)[None, :]
    block = start // 4
    if PLANES:
        above = program // across
        sample = (above // down).to(tl.int64)
        row = above % down * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < sizes[0]) & (column < sizes[1])
        block = row * (sizes[1] // 4) + start // 4
    else:
        row = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        elements = sizes[0]
        for d in tl.static_range(1, len(sizes)):
            elements = elements * sizes[d]
        inside = (row < batch) & (column < elements)
        sample = tl.minimum(row, batch - 1)  # so that per-sample loads need no mask
    return sample, row, column, block, inside


@triton.jit
def _offset(view, sizes, sample, row, column, PLANES: tl.constexpr):
    strides = view[2]
    offset = sample * view[1]
    if PLANES:
        offset = offset + row.to(tl.int64) * strides[0] + column.to(tl.int64) * strides[1]
    else:
        rest = column
        for i in tl.static_range(1, len(sizes)):
            size = sizes[len(sizes) - i]
            offset = offset + (rest % size).to(tl.int64) * strides[len(sizes) - i]
            rest = rest // size
        offset = offset + rest.to(tl.int64) * strides[0]
    return offset


@triton.jit
def load(view, sizes, sample, row, column, inside, PLANES: tl.constexpr):
    """Loads a tile as float32. Values outside the mask are undefined."""
    return tl.load(view[0] + _offset(view, sizes, sample, row, column, PLANES), mask=inside).to(tl.float32)


@triton.jit
def store(view, value, sizes, sample, row, column, inside, PLANES: tl.constexpr):
    pointer = view[0] + _offset(view, sizes, sample, row, column, PLANES)
    tl.store(pointer, value.to(view[0].dtype.element_ty), mask=inside)


@triton.jit
def of_sample(values, sample):
    """Loads one number per sample, from (pointer, stride)."""
    return tl.load(values[0] + sample * values[1])


@triton.jit
def resolve_step_size(step_size, step_size_per_sample, EXACT: tl.constexpr, sample):
    """Step size (one number, or one per sample) and noise scale of a tile."""
    if step_size_per_sample is not None:
        step_size = of_sample(step_size_per_sample, sample)
    return step_size, tl.sqrt_rn(step_size * (2 - step_size) if EXACT else 2 * step_size)
