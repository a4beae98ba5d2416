"""What the kernels of attention share: where a program stands, and its tiles of rows of one head.

A tensor (B, tokens, heads, head_dim) comes as (pointer, stride of a sample, of a token, of a head), the strides in
units of UNIT elements: 16 bytes where all of them allow it, so that the compiler knows that rows can be read as
vectors (a head of 40 numbers of bfloat16 has 80 bytes, and a stride of 40 alone does not tell it).

A row is read as one tile of D0 columns, or as two of D0 and D1 (attention_tiles.widths).
"""

import triton
import triton.language as tl


@triton.jit
def place(heads, tiles):
    """The tile, head and sample of this program: neighbours share a head, and with it what they both read."""
    program = tl.program_id(0)
    above = program // tiles
    return program % tiles, above % heads, (above // heads).to(tl.int64)


@triton.jit
def rows_of(view, sample, head, row, UNIT: tl.constexpr):
    """Pointers (rows, 1) to the first number of these rows. Offsets have 64 bits."""
    start = (sample * view[1] + head.to(tl.int64) * view[3]) * UNIT
    return view[0] + start + (row.to(tl.int64) * view[2] * UNIT)[:, None]


@triton.jit
def after(rows, view, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """The same rows of the next block."""
    return rows + tl.cast(view[2], tl.int64) * (BLOCK * UNIT)


@triton.jit
def load(rows, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH of these rows: 0 beyond head_dim, and where RAGGED in rows not `inside`."""
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
