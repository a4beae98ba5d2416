"""GroupNorm, and the SiLU behind it, by ops.group_norm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from emd_fast import ops
from emd_fast.fusion.fused_class import STATE, Fused, is_a

SERVED = (torch.float32, torch.bfloat16, torch.float16)


class Norm(Fused):
    """A GroupNorm of PyTorch, or one of its structure: num_groups, eps, weight (C,), bias (C,), nothing else.

    The blocks around it hand over what they would do next, so that one kernel does it: an addition before the norm,
    scale and shift after it, the activation. Hooks and wrappers of the module see its calls as before.
    """

    does = "group norm by one kernel"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if isinstance(module, nn.GroupNorm):
            return is_a(module, "GroupNorm")
        groups, eps = (getattr(module, name, None) for name in ("num_groups", "eps"))
        parameters = dict(module.named_parameters())
        return (
            isinstance(groups, int)
            and isinstance(eps, float)
            and set(parameters) == {"weight", "bias"}
            and parameters["weight"].dim() == 1
            and parameters["weight"].shape == parameters["bias"].shape
            and not any(True for _ in module.children())
            and "forward" not in vars(module)
        )

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        return None if module.eps > 0 else f"its eps is {module.eps}, and the kernel wants a positive one"

    @classmethod
    def check(cls, module: Any) -> None:
        channels, groups = channels_of(module), module.num_groups
        if groups < 1 or channels % groups:
            raise ValueError(f"num_groups must divide the channels: got {groups} for {channels} channels")

    @classmethod
    def probe(cls, module: Any) -> tuple[tuple[int, ...], ...] | None:
        channels = channels_of(module)
        return None if isinstance(module, nn.GroupNorm) else ((2, channels, 3, 3),)

    def forward(
        self,
        input: Tensor,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """activation(norm(input + add) (1 + scale) + shift): input (B, C, ...), the others (B, C)."""
        activation = activation or self.__dict__[STATE].get("activation")
        if input.dtype not in SERVED:
            return self._plain(input, add, scale, shift, activation)
        add, scale, shift = (_batched(vector, input) for vector in (add, scale, shift))
        return ops.group_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            add=add,
            scale=scale,
            shift=shift,
            activation=activation,
        )

    def _plain(
        self, x: Tensor, add: Tensor | None, scale: Tensor | None, shift: Tensor | None, activation: str | None
    ) -> Tensor:
        """For dtypes that the kernels do not have: the module's own forward, and the rest around it."""
        add, scale, shift = (v if v is None else v.reshape(*v.shape, *[1] * (x.dim() - 2)) for v in (add, scale, shift))
        y = super().forward(x if add is None else x + add)
        y = y if scale is None else y * (1 + scale)
        y = y if shift is None else y + shift
        return y if activation is None else silu(y)


def channels_of(norm: Any) -> int:
    """Of a norm that Norm recognises: PyTorch's may have no weight, EDM's has no other number."""
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else len(norm.weight)


def _batched(vector: Tensor | None, x: Tensor) -> Tensor | None:
    """One vector for all samples, as broadcasting has it, given to each."""
    return vector if vector is None or len(vector) == len(x) else vector.expand(len(x), -1)


class FoldedSiLU(Fused):
    """A SiLU that the norm before it has done already."""

    does = "done by the norm before it"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return False  # by its neighbour, not by itself: see silu_behind_norm

    def forward(self, input: Tensor) -> Tensor:
        return input


def silu_behind_norm(network: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """(norm, SiLU) of which the SiLU is used behind the norm and nowhere else."""
    uses: dict[int, int] = {}
    for module in network.modules():
        for child in module._modules.values():  # children() would leave out the second use in one module
            uses[id(child)] = uses.get(id(child), 0) + 1
    for module in network.modules():
        if type(module) is nn.Sequential:
            children = list(module._modules.values())
            pairs = list(itertools.pairwise(children))
        else:
            # The last layers of diffusers' UNets and autoencoders.
            last, act = (getattr(module, name, None) for name in ("conv_norm_out", "conv_act"))
            pairs = [(last, act)] if isinstance(last, nn.Module) and isinstance(act, nn.Module) else []
        for norm, activation in pairs:
            if (
                Norm.recognises(norm)
                and is_a(activation, "SiLU")
                and uses[id(norm)] == uses[id(activation)] == 1
                and not (activation._forward_hooks or activation._forward_pre_hooks)
            ):
                yield norm, activation
