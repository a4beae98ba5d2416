"""Backward pass of attention, in two kernels, so that no two programs add to the same element.

`attention_to_queries_kernel` loops over the keys for a block of queries and computes the gradient
of q. `attention_to_keys_kernel` loops over the queries for a block of keys and computes those of k
and v.

Both recompute the weights p as share 2^(logit - top), from two numbers per query that the forward
pass saved. A single log-sum-exp would be rounded relative to the size of the logits, and the error
would appear in every weight. With g the gradient of the output, the gradient of the logits is p (g
v^T - delta), where delta is the row sum of g times the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import attention_launch
from emd_fast.backends.triton.attention_tile import after, load, place, rows_of, store


@triton.jit(do_not_specialize=["tokens", "keys", "heads", "tiles"])
def attention_delta_kernel(
    delta,
    out,
    grad,
    tokens,
    keys,
    heads,
    tiles,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
):
    tile, head, sample = place(heads, tiles)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    out_rows, grad_rows = rows_of(out, sample, head, row, UNIT), rows_of(grad, sample, head, row, UNIT)
    o = load(out_rows, row < tokens, 0, D0, HEAD_DIM, True).to(tl.float32)
    g = load(grad_rows, row < tokens, 0, D0, HEAD_DIM, True).to(tl.float32)
    total = tl.sum(o * g, axis=1)
    if D1:
        o = load(out_rows, row < tokens, D0, D1, HEAD_DIM, True).to(tl.float32)
        g = load(grad_rows, row < tokens, D0, D1, HEAD_DIM, True).to(tl.float32)
        total += tl.sum(o * g, axis=1)
    tl.store(delta + (sample * heads + head) * tokens + row, total, mask=row < tokens)


@triton.jit(do_not_specialize=["tokens", "keys", "heads", "tiles"])
def attention_to_queries_kernel(
    to_q,
    grad,
    tops,
    shares,
    delta,
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
    there = row < tokens
    q_rows, g_rows = rows_of(q, sample, head, row, UNIT), rows_of(grad, sample, head, row, UNIT)
    k_rows, v_rows = rows_of(k, sample, head, column, UNIT), rows_of(v, sample, head, column, UNIT)

    q0 = load(q_rows, there, 0, D0, HEAD_DIM, RAGGED_M)
    g0 = load(g_rows, there, 0, D0, HEAD_DIM, RAGGED_M)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1:
        q1 = load(q_rows, there, D0, D1, HEAD_DIM, RAGGED_M)
        g1 = load(g_rows, there, D0, D1, HEAD_DIM, RAGGED_M)
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    of_head = (sample * heads + head) * tokens
    top = tl.load(tops + of_head + row, mask=there, other=0.0)
    share = tl.load(shares + of_head + row, mask=there, other=0.0)
    deltas = tl.load(delta + of_head + row, mask=there, other=0.0)

    whole = keys // BLOCK_N * BLOCK_N
    for TAIL in tl.static_range(2 if RAGGED_N else 1):
        for start in range(whole if TAIL else 0, keys if TAIL else whole, BLOCK_N):
            inside = start + column < keys
            k0 = load(k_rows, inside, 0, D0, HEAD_DIM, TAIL)
            v0 = load(v_rows, inside, 0, D0, HEAD_DIM, TAIL)
            logits = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            to_weights = tl.dot(g0, tl.trans(v0), input_precision=PRECISION)
            if D1:
                k1 = load(k_rows, inside, D0, D1, HEAD_DIM, TAIL)
                v1 = load(v_rows, inside, D0, D1, HEAD_DIM, TAIL)
                logits = tl.dot(q1, tl.trans(k1), logits, input_precision=PRECISION)
                to_weights = tl.dot(g1, tl.trans(v1), to_weights, input_precision=PRECISION)
            if NEGATIVE:
                logits = -logits
            weights = tl.exp2(logits * base_2 - top[:, None]) * share[:, None]
            if TAIL:  # keys past the end have logits of 0, which may be far above the top
                weights = tl.where(inside[None, :], weights, 0.0)
            to_logits = (weights * (to_weights - deltas[:, None])).to(k0.dtype)
            acc0 = tl.dot(to_logits, k0, acc0, input_precision=PRECISION)
            if D1:
                acc1 = tl.dot(to_logits, k1, acc1, input_precision=PRECISION)
            k_rows, v_rows = after(k_rows, k, BLOCK_N, UNIT), after(v_rows, v, BLOCK_N, UNIT)

    out_rows = rows_of(to_q, sample, head, row, UNIT)
    store(out_rows, acc0 * scale, there, 0, D0, HEAD_DIM)
    if D1:
        store(out_rows, acc1 * scale, there, D0, D1, HEAD_DIM)


@triton.jit(do_not_specialize=["tokens", "keys", "heads", "tiles"])
def attention_to_keys_kernel(
    to_k,
    to_v,
    grad,
    tops,
    shares,
    delta,
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
    """Matmuls here are transposed, (keys, queries), so that the accumulators need no transpose."""
    tile, head, sample = place(heads, tiles)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_M)
    there = column < keys
    k_rows, v_rows = rows_of(k, sample, head, column, UNIT), rows_of(v, sample, head, column, UNIT)
    q_rows, g_rows = rows_of(q, sample, head, row, UNIT), rows_of(grad, sample, head, row, UNIT)

    k0 = load(k_rows, there, 0, D0, HEAD_DIM, RAGGED_N)
    if D1:
        k1 = load(k_rows, there, D0, D1, HEAD_DIM, RAGGED_N)
    if to_k is not None:
        v0 = load(v_rows, there, 0, D0, HEAD_DIM, RAGGED_N)
        acc_k0 = tl.zeros([BLOCK_N, D0], tl.float32)
        if D1:
            v1 = load(v_rows, there, D0, D1, HEAD_DIM, RAGGED_N)
            acc_k1 = tl.zeros([BLOCK_N, D1], tl.float32)
    if to_v is not None:
        acc_v0 = tl.zeros([BLOCK_N, D0], tl.float32)
        if D1:
            acc_v1 = tl.zeros([BLOCK_N, D1], tl.float32)
    of_head = (sample * heads + head) * tokens

    whole = tokens // BLOCK_M * BLOCK_M
    for TAIL in tl.static_range(2 if RAGGED_M else 1):
        for start in range(whole if TAIL else 0, tokens if TAIL else whole, BLOCK_M):
            # Queries past the end have a gradient of 0 and add nothing, so they need no mask.
            inside = start + row < tokens
            q0 = load(q_rows, inside, 0, D0, HEAD_DIM, TAIL)
            g0 = load(g_rows, inside, 0, D0, HEAD_DIM, TAIL)
            logits = tl.dot(k0, tl.trans(q0), input_precision=PRECISION)
            if D1:
                q1 = load(q_rows, inside, D0, D1, HEAD_DIM, TAIL)
                g1 = load(g_rows, inside, D0, D1, HEAD_DIM, TAIL)
                logits = tl.dot(k1, tl.trans(q1), logits, input_precision=PRECISION)
            if NEGATIVE:
                logits = -logits
            top = tl.load(tops + of_head + start + row, mask=inside, other=0.0)
            share = tl.load(shares + of_head + start + row, mask=inside, other=0.0)
            weights = tl.exp2(logits * base_2 - top[None, :]) * share[None, :]
            if to_v is not None:
                rounded = weights.to(g0.dtype)
                acc_v0 = tl.dot(rounded, g0, acc_v0, input_precision=PRECISION)
                if D1:
                    acc_v1 = tl.dot(rounded, g1, acc_v1, input_precision=PRECISION)
            if to_k is not None:
                to_weights = tl.dot(v0, tl.trans(g0), input_precision=PRECISION)
                if D1:
                    to_weights = tl.dot(v1, tl.trans(g1), to_weights, input_precision=PRECISION)
                deltas = tl.load(delta + of_head + start + row, mask=inside, other=0.0)
                to_logits = (weights * (to_weights - deltas[None, :])).to(q0.dtype)
                acc_k0 = tl.dot(to_logits, q0, acc_k0, input_precision=PRECISION)
                if D1:
                    acc_k1 = tl.dot(to_logits, q1, acc_k1, input_precision=PRECISION)
            q_rows, g_rows = after(q_rows, q, BLOCK_M, UNIT), after(g_rows, grad, BLOCK_M, UNIT)

    if to_k is not None:
        out_rows = rows_of(to_k, sample, head, column, UNIT)
        store(out_rows, acc_k0 * scale, there, 0, D0, HEAD_DIM)
        if D1:
            store(out_rows, acc_k1 * scale, there, D0, D1, HEAD_DIM)
    if to_v is not None:
        out_rows = rows_of(to_v, sample, head, column, UNIT)
        store(out_rows, acc_v0, there, 0, D0, HEAD_DIM)
        if D1:
            store(out_rows, acc_v1, there, D0, D1, HEAD_DIM)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    top: Tensor,
    share: Tensor,
    scale: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    to_q, to_k, to_v = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else t.new_empty(0)
        for t, need in zip((q, k, v), needs, strict=True)
    )
    if not q.numel() or not k.numel():  # empty sums
        return to_q.zero_(), to_k.zero_(), to_v.zero_()
    if k.shape[1] == 1:  # the only weight is 1, so q and k have gradients of exactly 0
        to_q, to_k, needs = to_q.zero_(), to_k.zero_(), [False, False, needs[2]]
    # An expanded gradient, for example that of sum()
    if grad.stride(3) != 1 and grad.shape[3] > 1:
        grad = grad.contiguous()
    delta = None
    if needs[0] or needs[1]:
        delta = torch.empty_like(top)
        attention_launch.run("delta", attention_delta_kernel, delta, out, grad, q=q, k=k)
    rest = (grad, top, share, delta, q, k, v)
    if needs[0]:
        attention_launch.run("to_queries", attention_to_queries_kernel, to_q, *rest, q=q, k=k, scale=scale)
    if needs[1] and needs[2] and attention_launch.tiles("to_keys", q, k).apart:
        pairs = [(to_k, None), (None, to_v)]
    elif needs[1] or needs[2]:
        pairs = [(to_k if needs[1] else None, to_v if needs[2] else None)]
    else:
        pairs = []
    for pair in pairs:
        attention_launch.run("to_keys", attention_to_keys_kernel, *pair, *rest, q=q, k=k, scale=scale)
    return to_q, to_k, to_v
