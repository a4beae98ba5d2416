from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from emd_fast import backends
from emd_fast.ops import _check
from emd_fast.ops._define import define, differentiable

BACKENDS = ("triton", "sdpa", "cudnn", "xformers", "reference")
_MAX_HEAD_DIM = 256

# Only our backends, "triton" and "reference", use these two ops. "sdpa", "cudnn" and "xformers" have
# their own autograd.
_op = define(
    "attention",
    "Tensor q, Tensor k, Tensor v, float scale",
    "(Tensor, Tensor, Tensor)",
    fake=lambda q, k, v, scale: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32),
        q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32),
    ),
)
_backward_op = define(
    "attention_backward",
    "Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor top, Tensor share, float scale, bool[3] needs",
    "(Tensor, Tensor, Tensor)",
    fake=lambda grad, q, k, v, out, top, share, scale, needs: tuple(
        t.new_empty(t.shape if need else 0) for t, need in zip((q, k, v), needs, strict=True)
    ),
)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    needs = list(ctx.needs_input_grad[:3])
    if grad is None:
        return (None,) * 5
    found = _backward_op(grad, *ctx.saved_tensors, ctx.scale, needs, ctx.backend)
    return *(gradient if need else None for gradient, need in zip(found, needs, strict=True)), None, None


differentiable("attention", _setup_context, _backward)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None) -> Tensor:
    """Attention: softmax(scale q k^T) v, without a mask. Differentiable in q, k and v.

    The backward pass computes only the gradients that are needed.

    Args:
        q: (B, tokens, heads, head_dim) float32, bfloat16 or float16, with head_dim from 1 to 256
            and unit stride in head_dim. The other strides are free: a slice of a packed projection
            is not copied.
        k, v: (B, keys, heads, head_dim), dtype of q. There may be fewer or more keys than tokens.
            Without keys the result is 0, as in PyTorch.
        scale: 1 / sqrt(head_dim) when None.
        backend: "sdpa" (torch.nn.functional.scaled_dot_product_attention), "cudnn" (cuDNN's kernel,
            16-bit tensors on a GPU), "triton" (the kernel of this library), "xformers"
            (memory_efficient_attention) or "reference" (float32 arithmetic). None takes the backend
            of `use_backend`. Under "auto" that is "sdpa" on the CPU, and on a GPU the backend in the
            table of backends/attention_table.py.

    Returns:
        (B, tokens, heads, head_dim), dtype of q.

    "triton" multiplies float32 in float32, unless torch.backends.cuda.matmul allows TF32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or an unknown
            backend.
        RuntimeError: the backend cannot run here. The message gives the reason.

    Source: Vaswani et al. (arXiv 1706.03762). "triton" follows FlashAttention-2 (Dao, arXiv
    2307.08691).
    """
    _check_arguments(q, k, v, scale, backend)
    if scale is None:
        scale = 1 / math.sqrt(q.shape[3])
    chosen = backend or _by_default(q, k, v)
    if backend == "cudnn":  # a row of the table was checked already
        backends.require("attention", backend, q.device.type)
    if chosen == "cudnn" and q.shape[0] and q.shape[1] and k.shape[1]:
        return backends.cudnn.attention(q, k, v, float(scale))
    if chosen in ("sdpa", "cudnn"):  # cuDNN takes no empty tensors
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    if chosen == "xformers":
        backends.require("attention", chosen, q.device.type)
        return backends.xformers.attention(q, k, v, float(scale))
    return _op(q, k, v, float(scale), chosen)[0]


def _by_default(q: Tensor, k: Tensor, v: Tensor) -> str:
    active = backends.active()
    if active != "auto":
        return active
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return backends.for_attention(q.device, q.shape[3], q.dtype, q.shape[1], k.shape[1], gradient)


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, scale: float | None, backend: str | None) -> None:
    _check.tensor("q", q)
    if q.dim() != 4 or not 1 <= q.shape[3] <= _MAX_HEAD_DIM:
        raise ValueError(f"q must have shape (B, tokens, heads, head_dim), head_dim 1 to 256, got {tuple(q.shape)}")
    _check.tensor("k", k)
    if k.dim() != 4:
        raise ValueError(f"k must have shape (B, keys, heads, head_dim), got {tuple(k.shape)}")
    for name, value in (("k", k), ("v", v)):
        _check.tensor(name, value, shape=(q.shape[0], k.shape[1], *q.shape[2:]), like=q)
        if value.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {value.dtype}")
    for name, value in (("q", q), ("k", k), ("v", v)):
        if value.shape[3] > 1 and value.stride(3) != 1:
            raise ValueError(f"{name} must have unit stride in head_dim, got strides {tuple(value.stride())}")
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be None or one of {', '.join(BACKENDS)}, got {backend!r}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
