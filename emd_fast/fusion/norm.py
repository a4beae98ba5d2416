"""GroupNorm, and the SiLU behind it, by ops.group_norm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from emd_fast.fusion.fused_class import OVERRIDDEN, STATE, Fused, has, is_a, named
from emd_fast.fusion.published import unpublished
from emd_fast.ops.layers import GroupNorm, group_norm


class Norm(Fused):
    """A GroupNorm of PyTorch or of EDM.

    The blocks around it hand over what they would do next, so that one kernel does it: an addition
    before the norm, scale and shift after it, the activation. Hooks and wrappers of the module see
    its calls as before.
    """

    does = "group norm by one kernel"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        if isinstance(module, GroupNorm):  # calls the op itself
            return False
        return isinstance(module, nn.GroupNorm) or (
            named(module, "GroupNorm") is not None
            and has(module, "num_groups", "eps", "weight", "bias")
            and not any(True for _ in module.children())
        )

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        if isinstance(module, nn.GroupNorm):
            if not is_a(module, "GroupNorm", "torch.nn."):
                return OVERRIDDEN
        elif why := unpublished(module, "GroupNorm"):
            return why
        elif module.weight.dim() != 1 or module.weight.shape != module.bias.shape:
            return "its weight and bias are not those of a GroupNorm"
        return None if module.eps > 0 else f"its eps is {module.eps}, and the kernel wants a positive one"

    @classmethod
    def serves(cls, module: Any) -> bool:
        return cls.recognises(module) and cls.why_not(module) is None

    @classmethod
    def check(cls, module: Any) -> None:
        if cls.why_not(module) is not None:
            return
        channels, groups = channels_of(module), module.num_groups
        if groups < 1 or channels % groups:
            raise ValueError(f"num_groups must divide the channels: got {groups} for {channels} channels")

    def forward(
        self,
        input: Tensor,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        """activation(norm(input + add) (1 + scale) + shift): input (B, C, ...), the others (B, C)."""
        return group_norm(self, input, add, scale, shift, activation or self.__dict__[STATE].get("activation"))


def channels_of(norm: Any) -> int:
    """Of a norm that Norm recognises: PyTorch's may have no weight, EDM's has no other number."""
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else len(norm.weight)


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
                Norm.serves(norm)
                and is_a(activation, "SiLU", "torch.nn.")
                and uses[id(norm)] == uses[id(activation)] == 1
                and not (activation._forward_hooks or activation._forward_pre_hooks)
            ):
                yield norm, activation
