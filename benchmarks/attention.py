"""attention, forward and with backward, compared with xformers and flash-attention if installed.

An optional fifth size of the shape is the number of keys. It defaults to the number of tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.harness.declare import BOTH, DTYPES, Bench, Case, Function, Inputs, RandomTensors, Traffic
from emd_fast import ops
from emd_fast.ops.attention import BACKENDS

# Shapes that ADM (ImageNet-64) and Stable Diffusion 1.5 use.
ADM = ((16, 1024, 6, 64), (16, 256, 9, 64), (16, 64, 12, 64))
SD15 = (
    *((16, tokens, 8, head_dim) for tokens, head_dim in ((4096, 40), (1024, 80), (256, 160), (64, 160))),
    *((16, tokens, 8, head_dim, 77) for tokens, head_dim in ((4096, 40), (1024, 80), (256, 160), (64, 160))),
)


def sizes(case: Case) -> tuple[int, int, int, int, int]:
    """Returns (B, tokens, heads, head_dim, keys)."""
    batch, tokens, heads, head_dim, *rest = case.shape
    return batch, tokens, heads, head_dim, rest[0] if rest else tokens


def inputs(random: RandomTensors) -> Inputs:
    batch, tokens, heads, head_dim, keys = sizes(random.case)
    dtype = DTYPES[random.case.dtype]
    q, k, v, cotangent = (random.normal(batch, n, heads, head_dim).to(dtype) for n in (tokens, keys, keys, tokens))
    return Inputs({"q": q, "k": k, "v": v}, cotangent)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[3])
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)


def traffic(case: Case) -> Traffic:
    batch, tokens, heads, head_dim, keys = sizes(case)
    rows = batch * heads * head_dim * case.width
    forward = Traffic(rows * (tokens + 2 * keys), rows * tokens)
    if case.passes != BOTH:
        return forward
    # Backward reads q, k, v, the output and its gradient, and writes three gradients.
    return Traffic(forward.read + rows * (3 * tokens + 2 * keys), forward.written + rows * (tokens + 2 * keys))


def flops(case: Case) -> float:
    batch, tokens, heads, head_dim, keys = sizes(case)
    matmul = 2 * batch * heads * tokens * keys * head_dim
    # The backward pass has five matmuls; one of them recomputes the logits.
    return (2 + 5) * matmul if case.passes == BOTH else 2 * matmul


def implementations(bench: Bench, device: torch.device) -> dict[str, Function | str]:
    """Tries every attention backend once; a backend that cannot run gives the reason."""
    asked = torch.zeros(1, 16, 1, 16, device=device, dtype=torch.bfloat16)
    found: dict[str, Function | str] = {}
    for name in BACKENDS:
        call = functools.partial(ops.attention, backend=name)
        try:
            call(asked, asked, asked)
            found[name] = call
        except RuntimeError as error:
            found[name] = " ".join(str(error).split())
    return found


def peers(case: Case) -> Mapping[str, Function]:
    found: dict[str, Function] = {}
    if case.device.type == "cuda" and importlib.util.find_spec("xformers"):
        found["xformers"] = _xformers
    if case.device.type == "cuda" and importlib.util.find_spec("flash_attn"):
        found["flash_attn"] = _flash
    return found


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q, k, v)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v)


BENCH = Bench(
    name="attention",
    op=ops.attention,
    inputs=inputs,
    eager=eager,
    exact=exact,
    traffic=traffic,
    shapes={"cpu": ((2, 256, 8, 64),), "cuda": ADM + SD15},
    axes=("B", "tokens", "heads", "head_dim", "[keys]"),
    gradients=("q", "k", "v"),
    flops=flops,
    peers=peers,
    implementations=implementations,
    # The logits of 16 samples of 4096 tokens take 17 GB in float64, and the backward pass five of these.
    verified=lambda case: dataclasses.replace(case, shape=(min(case.shape[0], 2), *case.shape[1:])),
    layouts=False,
)
