"""LayerNorm that reads and writes two bytes under autocast on a GPU, and keeps its input so.

There autocast computes layer norms in float32: PyTorch's reads a float32 copy of its input, keeps
it for the backward pass, and returns float32, which each projection behind it casts again. The
statistics need float32, and the result is rounded in any case before the products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from emd_fast import ops
from emd_fast.cache.weights import autocast_dtype
from emd_fast.fusion.fused_class import Fused, is_a

# On the output of a norm: the norm, its input, and the output's version then. A layer that would
# rather have the output computed again than keep it looks there.
_SOURCE = "_emd_fast_source"


class LayerNorm(Fused):
    """A LayerNorm of PyTorch's."""

    does = "where it is frozen, result and kept input in the dtype of the input, and not in float32"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_a(module, "LayerNorm", "torch.nn.")

    def forward(self, input: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters(recurse=False))
        differentiated = torch.is_grad_enabled() and input.requires_grad
        if trains or torch.compiler.is_compiling():
            return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        if _widened(input) and len(self.normalized_shape) == 1 and self.eps > 0:
            # Each token is a sample with one group. The op reads float32 weights beside an input
            # of two bytes, which PyTorch's kernel for a GPU does not.
            tokens = input.flatten(0, -2)
            out: Tensor = ops.group_norm(tokens, 1, self.weight, self.bias, eps=self.eps).view(input.shape)
            if differentiated:
                setattr(out, _SOURCE, (self, input, out._version))
            return out
        if not differentiated:
            return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        # As autocast does it, which leaves the norms of a CPU alone.
        in_float32 = input.is_cuda and autocast_dtype("cuda") is not None and input.dtype != torch.float64
        dtype = torch.float32 if in_float32 else input.dtype
        out = _ToInput.apply(input, dtype, self.weight, self.bias, self.normalized_shape, self.eps)[0]
        setattr(out, _SOURCE, (self, input, out._version))
        return out


def _widened(x: Tensor) -> bool:
    """Whether autocast would make float32 of an input in the dtype of the products."""
    return x.is_cuda and x.dim() > 1 and x.dtype == autocast_dtype("cuda")


class _ToInput(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype, weight: Tensor, bias: Tensor, shape: Any, eps: float) -> Any:
        return torch.native_layer_norm(x.to(dtype), shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.dtype, weight, bias, ctx.shape, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # zeros for mean and rstd, which are not read
        ctx.save_for_backward(x, *output[1:], weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        if grad is None:
            return (None,) * 6
        x, mean, rstd, weight, bias = ctx.saved_tensors
        of_x = torch.ops.aten.native_layer_norm_backward(
            grad, x.to(ctx.dtype), ctx.shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
        return of_x.to(x.dtype), None, None, None, None, None


def source(normed: Tensor) -> tuple[LayerNorm, Tensor] | None:
    """(norm, input) for the unchanged output of a fused frozen LayerNorm, None for other tensors."""
    norm, x, version = getattr(normed, _SOURCE, (None, normed, 0))
    return (norm, x) if norm is not None and normed._version == version else None
