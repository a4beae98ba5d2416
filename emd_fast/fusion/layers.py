"""Convolutions and linear layers: weights prepared once per E-step, inputs not kept where they are frozen."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from emd_fast.cache.weights import WEIGHT_CACHE, autocast_dtype, is_plain
from emd_fast.fusion.convolution import convolution
from emd_fast.fusion.fused_class import Fused

_OF_PYTORCH = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _rounded(name: str) -> Any:
    """A parameter of a layer as its products read it: the copy in autocast's dtype, where one was prepared."""

    def get(layer: Any) -> Any:
        parameters = layer._parameters
        if name not in parameters:  # moved away since, by a reparametrisation
            if name in layer.__dict__:
                return layer.__dict__[name]
            raise AttributeError(name)
        parameter, prepared = parameters[name], layer._emd_fast_weight_cache
        if prepared is None or name not in prepared or (torch.is_grad_enabled() and parameter.requires_grad):
            return parameter
        copy = prepared[name]
        return copy if autocast_dtype(copy.device.type) == copy.dtype else parameter

    def set(layer: Any, value: Any) -> None:
        layer.__dict__[name] = value

    def delete(layer: Any) -> None:
        del layer.__dict__[name]

    return property(get, set, delete)


class Rounded(Fused):
    """A layer whose forward uses its weight in a product and nowhere else."""

    prepares: ClassVar[str] = "weight rounded once per E-step under autocast"
    spares: ClassVar[str] = ""
    """Two halves of its line in the report: of its weight, and what else."""
    rounds: tuple[str, ...] = ("weight",)
    weight = _rounded("weight")

    @classmethod
    def note(cls, module: Any) -> str:
        prepares = cls.prepares
        if type(module._parameters.get("weight")).__name__ == "DTensor":
            prepares += " if FSDP2 gathers it in float32; as it is gathered in any other precision"
        return "; ".join(half for half in (prepares, cls.spares) if half)

    @classmethod
    def fuse(cls, module: Any, **state: Any) -> None:
        super().fuse(module, **state)
        module.__dict__[WEIGHT_CACHE] = None

    @classmethod
    def unfuse(cls, module: Any) -> None:
        super().unfuse(module)
        del module.__dict__[WEIGHT_CACHE]

    def prepare(self) -> dict[str, Tensor]:
        """What `prepared` is to keep: tensors by the names under which the forward looks for them."""
        own = {name: self._parameters.get(name) for name in self.rounds}
        plain = {name: parameter.detach() for name, parameter in own.items() if is_plain(parameter)}
        dtypes = {name: autocast_dtype(parameter.device.type) for name, parameter in plain.items()}
        return {name: parameter.to(dtypes[name]) for name, parameter in plain.items() if dtypes[name] is not None}


class Layer(Rounded):
    """A Linear or convolution of PyTorch's."""

    rounds = ("weight", "bias")
    bias = _rounded("bias")

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return _computes(module, *_OF_PYTORCH) and not isinstance(module, nn.Conv2d)


class Convolution(Layer):
    """A Conv2d of PyTorch's."""

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
    """Whether it is one of these, with the forward of that and parameters of its own."""
    return "forward" not in vars(module) and any(
        isinstance(module, one) and type(module).forward is one.forward and "weight" in module._parameters
        for one in classes
    )
