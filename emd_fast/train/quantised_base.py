"""The frozen base of adapters in 8 or 4 bits, through torchao: linear layers keep quantised weights.

A pass multiplies by the weights that the bits stand for, in the compute dtype. Teacher and adapted
networks share the bits, so that their rounding is the same in all passes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from emd_fast import distributed
from emd_fast.config import ConfigError, EMDConfig
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.fusion.fusing import unfuse
from emd_fast.io import quiet
from emd_fast.train.cast_weights import matmul_weights

_PREFIX = "quantised_"  # of the buffers of a layer
_NF4_BLOCK, _NF4_SCALES = 64, 256  # weights that share a scale, scales that share one of their own


class QuantisedLinear(nn.Linear):
    """A frozen linear layer whose weight is held in the parts of a tensor of torchao, as buffers.

    `weight` computes the weight (out_features, in_features), in the dtype that the layer had. Nothing
    keeps it: backward passes, to the input alone, compute it again.
    """

    _emd_fast_parts: tuple[type, tuple[str, ...], Any, dict[str, torch.dtype]]

    @classmethod
    def of(cls, layer: nn.Linear, tensor: Any) -> QuantisedLinear:
        """Makes a layer with the bias of another one and a quantised weight."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.in_features, made.out_features = layer.in_features, layer.out_features
        made.register_parameter("bias", layer.bias)
        names, context = tensor.__tensor_flatten__()
        parts = {name: getattr(tensor, name) for name in names}
        made._emd_fast_parts = type(tensor), tuple(names), context, {n: part.dtype for n, part in parts.items()}
        for name, part in parts.items():
            # Process groups do not send float8.
            made.register_buffer(_PREFIX + name, part.view(torch.uint8) if _is_float8(part) else part)
        return made.eval()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        kind, names, context, dtypes = self._emd_fast_parts
        parts = {name: self._buffers[_PREFIX + name].view(dtypes[name]) for name in names}  # type: ignore[union-attr]
        shape = self.out_features, self.in_features
        tensor: Any = kind.__tensor_unflatten__(parts, context, shape, (self.in_features, 1))  # type: ignore[attr-defined]
        weight: Tensor = tensor.dequantize() if hasattr(tensor, "qdata") else tensor.get_original_weight()
        return weight

    def forward(self, input: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and input.requires_grad):
            return linear(input, self.weight.detach(), self.bias)
        output: Tensor = _Product.apply(input, self)
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedLinear:
        copied = memo[id(self)] = type(self).__new__(type(self))
        parts = self._emd_fast_parts
        own = {name: value for name, value in self.__dict__.items() if name != "_emd_fast_parts"}
        copied.__dict__.update(copy.deepcopy(own, memo), _emd_fast_parts=parts)
        return copied


class _Product(torch.autograd.Function):
    """The product with a quantised weight, differentiable in the input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, input.dtype
        return linear(input, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return (gradient @ ctx.layer.weight.to(gradient.dtype)).to(ctx.dtype), None


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize == 1


def quantised(base: Denoiser, base_dtype: str) -> Denoiser:
    """Returns a frozen copy of a base with QuantisedLinear layers; other tensors are shared.

    Quantised are the weights of linear layers that nothing else reads (`matmul_weights`), rounded from
    their own dtype. Convolutions, norms and embeddings stay as they are, and so does the first weight
    of the network.

    Args:
        base: on any device, including meta.
        base_dtype: "int8" or "fp8", with a scale for each row, or "nf4", with one for 64 weights.

    Raises:
        ConfigError: torchao is not installed, or cannot quantise a layer.
    """
    quantise = quantiser(base_dtype)
    copied = copy.deepcopy(base, {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())})
    unfuse(copied)
    for parent, name, layer in list(_linear_layers(copied, base_dtype)):
        try:
            setattr(parent, name, QuantisedLinear.of(layer, quantise(layer.weight.detach())))
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f'base_dtype must be "auto" here: torchao makes no {base_dtype} of {name}: {said}'
            ) from error
    return copied


def _linear_layers(network: nn.Module, base_dtype: str) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """(module, name in it, layer) of every layer that is quantised."""
    alone = {id(weight) for weight in matmul_weights(network)}
    for parent in network.modules():
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear and id(layer.weight) in alone and _fits(layer.weight, base_dtype):
                yield parent, name, layer


def _fits(weight: Tensor, base_dtype: str) -> bool:
    return base_dtype != "nf4" or not weight.numel() % _NF4_BLOCK


def held(network: nn.Module, base_dtype: str) -> tuple[int, float]:
    """Counts the weights of a network that are quantised, and the bytes that they take then."""
    weights, size = 0, 0.0
    for _, _, layer in _linear_layers(network, base_dtype):
        n, rows = layer.weight.numel(), layer.out_features
        weights += n
        # A scale in float32, for int8 with a zero point; the scales of NF4 have 8 bits.
        size += {"int8": n + 5 * rows, "fp8": n + 4 * rows, "nf4": n / 2 + n / _NF4_BLOCK}[base_dtype]
    return weights, size


def quantiser(base_dtype: str) -> Any:
    """Returns a function from a weight (out, in) to torchao's quantised tensor.

    Raises:
        ConfigError: torchao is not installed, or lacks the format.
    """
    quiet.import_with_torchao()
    try:
        from torchao import quantization
        from torchao.quantization import NF4Tensor, quantize_
    except ImportError as error:
        raise ConfigError(
            f'base_dtype "{base_dtype}" needs torchao ({error}): `pip install "emd_fast[quantized]"`, or "auto"'
        ) from None

    def nf4(weight: Tensor) -> Any:
        return NF4Tensor.from_tensor(weight, _NF4_BLOCK, math.gcd(weight.numel() // _NF4_BLOCK, _NF4_SCALES))

    def by_rows(weight: Tensor) -> Any:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        config = quantization.Int8WeightOnlyConfig if base_dtype == "int8" else quantization.Float8WeightOnlyConfig
        quantize_(layer, config(set_inductor_config=False))
        return layer.weight.data

    return nf4 if base_dtype == "nf4" else by_rows


def dequantised(network: nn.Module) -> None:
    """Puts plain linear layers, with float32 weights, in place of the quantised ones."""
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, QuantisedLinear):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
                plain.weight = nn.Parameter(layer.weight.float(), requires_grad=False)
                plain.bias = layer.bias
                setattr(parent, name, plain)


def resolve(config: EMDConfig, parameters: int, ranks: int = 0) -> tuple[str, str]:
    """`distributed.resolve` of a configuration: a quantised base is whole on every rank."""
    wanted = config.parallelism.parallel
    mode, reason = distributed.resolve(wanted, parameters, ranks)
    if config.adapter.base_dtype != "auto" and wanted == "auto" and mode != "replicate":
        return "replicate", "a quantised base is whole on every rank"
    return mode, reason
