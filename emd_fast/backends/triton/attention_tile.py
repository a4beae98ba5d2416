"""Device functions of the attention kernels: program index, and loads and stores of tiles of rows.

A tensor (B, tokens, heads, head_dim) is passed as (pointer, sample stride, token stride, head
stride). Strides are in units of UNIT elements. UNIT is 16 bytes where all strides permit, which
tells the compiler that it may use vector loads. (A head of 40 bfloat16 elements has 80 bytes; the
compiler cannot infer 16-byte alignment from a stride of 40.)

A row is read as one tile of D0 columns, or as two of D0 and D1 (attention_tiles.widths).
"""

import triton
import triton.language as tl


@triton.jit
def place(heads, tiles):
    """Tile, head and sample of this program.

    Neighbouring programs share a head, for the L2 cache.
    """
    program = tl.program_id(0)
    above = program // tiles
    return program % tiles, above % heads, (above // heads).to(tl.int64)


@triton.jit
def rows_of(view, sample, head, row, UNIT: tl.constexpr):
    """Pointers (rows, 1) to the first element of these rows, with 64-bit offsets."""
    start = (sample * view[1] + head.to(tl.int64) * view[3]) * UNIT
    return view[0] + start + (row.to(tl.int64) * view[2] * UNIT)[:, None]


@triton.jit
def after(rows, view, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """Pointers to the same rows of the next block."""
    return rows + tl.cast(view[2], tl.int64) * (BLOCK * UNIT)


@triton.jit
def load(rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr):
    """Loads columns FIRST to FIRST + WIDTH. 0 beyond head_dim and, if RAGGED, outside `inside`."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH > HEAD_DIM:
        if RAGGED:
            tile = tl.load(rows + column, mask=inside[:, None] & (column < HEAD_DIM), other=0.0)
        else:
            tile = tl.load(rows + column, mask=column < HEAD_DIM, other=0.0)
    elif RAGGED:
        tile = tl.load(rows + column, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(rows + column)
    return tile


@triton.jit
def store(rows, value, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    tl.store(rows + column, value.to(rows.dtype.element_ty), mask=inside[:, None] & (column < HEAD_DIM))
