"""GEGLU that keeps less for the backward pass.

For values and gates Stable Diffusion 1.5 would keep 185 of 491 MB a sample: eight times the
channels of a token. To compute one of them again costs a product with as many terms as a token has
channels. That is cheapest where channels are few, and there tokens are many. Up to `FEW_CHANNELS`
the backward pass to the input computes them again.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emd_fast import backends
from emd_fast.cache.weights import autocast_dtype
from emd_fast.fusion.fused_class import OVERRIDDEN, Fused, is_a, named, unknown_attributes
from emd_fast.fusion.layer_norm import source
from emd_fast.ops.layers import geglu

FEW_CHANNELS = 320


class GEGLU(Fused):
    """diffusers' GEGLU: one product gives values and gates, which are gated by GELU."""

    does = (
        "gated by one kernel, the GELU of the gates computed again in the backward pass instead of being kept, "
        f"and up to {FEW_CHANNELS} channels their product where it is frozen"
    )

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return named(module, "GEGLU", "diffusers.") is not None

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        known = is_a(module, "GEGLU", "diffusers.")
        return unknown_attributes(module, frozenset({"proj"})) if known else OVERRIDDEN

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        again = hidden_states.shape[-1] <= FEW_CHANNELS and _to_input_alone(self, hidden_states)
        result: Tensor
        if torch.compiler.is_compiling() or args or kwargs:
            # Compiled code chooses itself what it computes again, but for products.
            own = super().forward
            if again and not (args or kwargs):
                result = checkpoint(own, hidden_states, use_reentrant=False, preserve_rng_state=False)
            else:
                result = own(hidden_states, *args, **kwargs)
        elif again:
            result = _Again.apply(hidden_states, self.proj)
        else:
            result = geglu(self.proj(hidden_states))
        return result


def _to_input_alone(module: Any, x: Tensor) -> bool:
    """Whether the backward pass is one to x, and to no parameter."""
    return torch.is_grad_enabled() and x.requires_grad and not any(p.requires_grad for p in module.parameters())


class _Again(torch.autograd.Function):
    """geglu(projection(x)) that keeps x alone, or the input of the norm that gave x."""

    @staticmethod
    def forward(x: Tensor, projection: nn.Module) -> Tensor:
        return geglu(projection(x))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, nn.Module], output: Tensor) -> None:
        x, ctx.projection = inputs
        ctx.norm, kept = source(x) or (None, x)
        ctx.autocast, ctx.backend = autocast_dtype(x.device.type), backends.active()
        ctx.save_for_backward(kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        differentiable = torch.is_grad_enabled()  # for a second derivative
        (x,) = ctx.saved_tensors
        # This may run in another thread, after the end of autocast. The products must be the same.
        with _autocast(x.device.type, ctx.autocast), backends.use_backend(ctx.backend):
            x = x if ctx.norm is None else ctx.norm(x)
            x = x if differentiable else x.detach().requires_grad_()
            with torch.enable_grad():
                gated = geglu(ctx.projection(x))
        return torch.autograd.grad(gated, x, grad, create_graph=differentiable)[0], None


def _autocast(device_type: str, dtype: torch.dtype | None) -> Any:
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)
