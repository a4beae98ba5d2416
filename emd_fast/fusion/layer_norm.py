"""LayerNorm with frozen weights, of which autograd keeps the input in its own dtype.

On a GPU autocast computes layer norms in float32, and PyTorch's then keeps a float32 copy of an
input of two bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from emd_fast.cache.weights import autocast_dtype
from emd_fast.fusion.fused_class import Fused, is_a

# On the output of a norm: the norm, its input, and the output's version then. A layer that would
# rather have the output computed again than keep it looks there.
_SOURCE = "_emd_fast_source"


class LayerNorm(Fused):
    """A LayerNorm of PyTorch's."""

    does = "input kept as it came, and not in float32, for the backward pass where it is frozen"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return is_a(module, "LayerNorm", "torch.nn.")

    def forward(self, input: Tensor) -> Tensor:
        frozen = not any(parameter.requires_grad for parameter in self.parameters(recurse=False))
        if torch.compiler.is_compiling() or not (frozen and torch.is_grad_enabled() and input.requires_grad):
            return layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)
        # As autocast does it, which leaves the norms of a CPU alone.
        in_float32 = input.is_cuda and autocast_dtype("cuda") is not None and input.dtype != torch.float64
        dtype = torch.float32 if in_float32 else input.dtype
        out: Tensor = _ToInput.apply(input, dtype, self.weight, self.bias, self.normalized_shape, self.eps)[0]
        setattr(out, _SOURCE, (self, input, out._version))
        return out


class _ToInput(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype, weight: Tensor, bias: Tensor, shape: Any, eps: float) -> Any:
        return torch.native_layer_norm(x.to(dtype), shape, weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.dtype, weight, bias, ctx.shape, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, *output[1:], weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        of_x = torch.ops.aten.native_layer_norm_backward(
            grad, x.to(ctx.dtype), ctx.shape, mean, rstd, weight, bias, [True, False, False]
        )[0]
        return of_x.to(x.dtype), None, None, None, None, None


def source(normed: Tensor) -> tuple[LayerNorm, Tensor] | None:
    """(norm, input) for the unchanged output of a fused frozen LayerNorm, None for other tensors."""
    norm, x, version = getattr(normed, _SOURCE, (None, normed, 0))
    return (norm, x) if norm is not None and normed._version == version else None
