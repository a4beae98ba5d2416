import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.reference.group_norm import layout
from emd_fast.backends.triton import launch


@triton.jit
def residual_kernel(
    out,
    x,
    skip,
    bias,
    skip_bias,
    scale,
    elements,
    positions,
    CHANNELS: tl.constexpr,
    LAST: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """All tensors have one dense layout, so that an element has one offset."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    inside = at < elements
    total = tl.load(x + at, mask=inside).to(tl.float32) + tl.load(skip + at, mask=inside).to(tl.float32)
    channel = at % CHANNELS if LAST else at // positions % CHANNELS
    if bias is not None:
        total += tl.load(bias[0] + channel * bias[1]).to(tl.float32)
    if skip_bias is not None:
        total += tl.load(skip_bias[0] + channel * skip_bias[1]).to(tl.float32)
    tl.store(out + at, (total * scale).to(out.dtype.element_ty), mask=inside)


def residual(x: Tensor, skip: Tensor, bias: Tensor | None, skip_bias: Tensor | None, scale: float) -> Tensor:
    format = layout(x)
    x, skip = x.contiguous(memory_format=format), skip.contiguous(memory_format=format)
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, skip.dtype), memory_format=format)
    elements, positions = x.numel(), math.prod(x.shape[2:])
    if not elements:
        return out
    last = format != torch.contiguous_format or positions == 1
    launch.submit(
        residual_kernel,
        -(-elements // launch.TILE),
        (
            out,
            x,
            skip,
            None if bias is None else launch.by_sample(bias),
            None if skip_bias is None else launch.by_sample(skip_bias),
            float(scale),
            elements,
            positions,
        ),
        {"CHANNELS": x.shape[1], "LAST": last, "TILE": launch.TILE, "WIDE": elements + launch.TILE >= 2**31},
        4,
        x.device,
    )
    return out
