import torch
import triton
import triton.language as tl
from torch import Tensor

from emd_fast.backends.triton import launch


@triton.jit
def _place(elements, HALF: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    """Elements of a program, where their values are in `packed` (the gates lie HALF further), and the mask."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    at = program * TILE + tl.arange(0, TILE)
    return at, at // HALF * (2 * HALF) + at % HALF, at < elements


@triton.jit
def _share(gate):
    """GELU over its argument: the normal distribution function."""
    return 0.5 * (1 + tl.erf(gate * 0.7071067811865476))


@triton.jit
def geglu_kernel(out, packed, elements, HALF: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    at, of_value, inside = _place(elements, HALF, TILE, WIDE)
    value = tl.load(packed + of_value, mask=inside).to(tl.float32)
    gate = tl.load(packed + of_value + HALF, mask=inside).to(tl.float32)
    tl.store(out + at, (value * (gate * _share(gate))).to(out.dtype.element_ty), mask=inside)


@triton.jit
def geglu_backward_kernel(out, grad, packed, elements, HALF: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr):
    at, of_value, inside = _place(elements, HALF, TILE, WIDE)
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    value = tl.load(packed + of_value, mask=inside).to(tl.float32)
    gate = tl.load(packed + of_value + HALF, mask=inside).to(tl.float32)
    share = _share(gate)
    slope = share + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    dtype = out.dtype.element_ty
    tl.store(out + of_value, (g * (gate * share)).to(dtype), mask=inside)
    tl.store(out + of_value + HALF, (g * value * slope).to(dtype), mask=inside)


def _submit(kernel, out, *tensors):  # type: ignore[no-untyped-def]
    """Launches a kernel over the elements of the first of `tensors` that has one element per value."""
    packed = tensors[-1]
    elements = packed.numel() // 2
    if elements:
        launch.submit(
            kernel,
            -(-elements // launch.TILE),
            (out, *tensors, elements),
            {"HALF": packed.shape[-1] // 2, "TILE": launch.TILE, "WIDE": 2 * (elements + launch.TILE) >= 2**31},
            4,
            packed.device,
            {"enable_fp_fusion": True},
        )
    return out


def geglu(packed: Tensor) -> Tensor:
    packed = packed.contiguous()
    out = packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))
    result: Tensor = _submit(geglu_kernel, out, packed)
    return result


def geglu_backward(grad: Tensor, packed: Tensor) -> Tensor:
    packed = packed.contiguous()
    result: Tensor = _submit(geglu_backward_kernel, torch.empty_like(packed), grad.contiguous(), packed)
    return result
