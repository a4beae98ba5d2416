import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import attention_launch
from emd_fast.backends.triton.attention_backward import attention_backward
from emd_fast.backends.triton.attention_tile import after, load, place, rows_of, store

__all__ = ["attention", "attention_backward"]


@triton.jit
def _softmax_step(logits, base_2, top, total, inside, MASKED: tl.constexpr):
    """Online softmax: weights of this block of keys, and the factor that rescales earlier blocks.

    Logits are multiplied by `base_2`, so that exp2, one instruction, replaces exp. The weights are
    masked after exp2: logits of -inf would become NaN at a scale of 0.
    """
    highest = logits
    if MASKED:
        highest = tl.where(inside[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(highest, axis=1) * base_2)
    weights = tl.exp2(logits * base_2 - new_top[:, None])
    if MASKED:
        weights = tl.where(inside[None, :], weights, 0.0)
    shrink = tl.exp2(top - new_top)
    return weights, shrink, new_top, total * shrink + tl.sum(weights, axis=1)


@triton.jit(do_not_specialize=["tokens", "keys", "heads", "tiles"])
def attention_kernel(
    out,
    tops,
    shares,
    q,
    k,
    v,
    base_2,
    scale,
    tokens,
    keys,
    heads,
    tiles,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RAGGED_M: tl.constexpr,
    RAGGED_N: tl.constexpr,
    NEGATIVE: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, head, sample = place(heads, tiles)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    q_rows = rows_of(q, sample, head, row, UNIT)
    k_rows = rows_of(k, sample, head, column, UNIT)
    v_rows = rows_of(v, sample, head, column, UNIT)

    q0 = load(q_rows, row < tokens, 0, D0, HEAD_DIM, RAGGED_M)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1:
        q1 = load(q_rows, row < tokens, D0, D1, HEAD_DIM, RAGGED_M)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    whole = keys // BLOCK_N * BLOCK_N
    # Only the last, partial block of keys is masked.
    for TAIL in tl.static_range(2 if RAGGED_N else 1):
        for start in range(whole if TAIL else 0, keys if TAIL else whole, BLOCK_N):
            inside = start + column < keys
            k0 = load(k_rows, inside, 0, D0, HEAD_DIM, TAIL)
            logits = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            if D1:
                k1 = load(k_rows, inside, D0, D1, HEAD_DIM, TAIL)
                logits = tl.dot(q1, tl.trans(k1), logits, input_precision=PRECISION)
            if NEGATIVE:
                logits = -logits
            weights, shrink, top, total = _softmax_step(logits, base_2, top, total, inside, TAIL)
            v0 = load(v_rows, inside, 0, D0, HEAD_DIM, TAIL)
            weights = weights.to(v0.dtype)
            acc0 = tl.dot(weights, v0, acc0 * shrink[:, None], input_precision=PRECISION)
            if D1:
                v1 = load(v_rows, inside, D0, D1, HEAD_DIM, TAIL)
                acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision=PRECISION)
            k_rows = after(k_rows, k, BLOCK_N, UNIT)
            v_rows = after(v_rows, v, BLOCK_N, UNIT)

    out_rows = rows_of(out, sample, head, row, UNIT)
    store(out_rows, acc0 / total[:, None], row < tokens, 0, D0, HEAD_DIM)
    if D1:
        store(out_rows, acc1 / total[:, None], row < tokens, D0, D1, HEAD_DIM)
    of_head = (sample * heads + head) * tokens
    tl.store(tops + of_head + row, top, mask=row < tokens)
    tl.store(shares + of_head + row, 1.0 / total, mask=row < tokens)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    top = torch.empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32, device=q.device)
    share = torch.empty_like(top)
    if not q.numel() or not k.numel():  # empty sums
        return out.zero_(), top.fill_(-float("inf")), share.zero_()
    attention_launch.run("forward", attention_kernel, out, top, share, q, k, v, q=q, k=k, scale=scale)
    return out, top, share
