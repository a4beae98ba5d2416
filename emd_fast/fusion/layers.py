"""PyTorch's convolutions and linear layers, with weights that are cast once per E-step."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from emd_fast.cache.layers import CastWeight, cast_parameter
from emd_fast.cache.weights import WEIGHT_CACHE
from emd_fast.fusion.fused_class import Fused
from emd_fast.ops.convolution import convolution

_OF_PYTORCH = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Rounded(CastWeight, Fused):
    """A layer whose weight is cast once per E-step."""

    prepares: ClassVar[str] = "weight rounded once per E-step under autocast"
    """The first half of its line in the report."""
    spares: ClassVar[str] = ""
    """The second half."""

    @classmethod
    def note(cls, module: Any) -> str:
        prepares = cls.prepares
        if type(module._parameters.get("weight")).__name__ == "DTensor":
            prepares += " if FSDP2 gathers it in float32; as it is gathered in any other precision"
        return "; ".join(half for half in (prepares, cls.spares) if half)

    @classmethod
    def fuse(cls, module: Any, **state: Any) -> None:
        super().fuse(module, **state)
        module.start_cache()

    @classmethod
    def unfuse(cls, module: Any) -> None:
        super().unfuse(module)
        del module.__dict__[WEIGHT_CACHE]


class Layer(Rounded):
    """A Linear, Conv1d or Conv3d of PyTorch."""

    rounds = ("weight", "bias")
    bias = cast_parameter("bias")

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return _computes(module, *_OF_PYTORCH) and not isinstance(module, nn.Conv2d)


class Convolution(Layer):
    """A Conv2d of PyTorch."""

    spares = "input not kept for the backward pass where it is frozen"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        own = type(module)._conv_forward is nn.Conv2d._conv_forward if isinstance(module, nn.Conv2d) else False
        return own and _computes(module, nn.Conv2d)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.padding_mode != "zeros" or isinstance(self.padding, str):
            result: Tensor = super()._conv_forward(input, weight, bias)  # type: ignore[misc]
            return result
        return convolution(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _computes(module: Any, *classes: type[nn.Module]) -> bool:
    """Whether it has the forward of one of these classes and a weight of its own."""
    return "forward" not in vars(module) and any(
        isinstance(module, one) and type(module).forward is one.forward and "weight" in module._parameters
        for one in classes
    )
