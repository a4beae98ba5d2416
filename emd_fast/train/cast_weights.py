"""A frozen network that holds the weights of its products in the dtype of the products, and nowhere in float32.

Under autocast a product reads its float32 weights rounded. Weights that nobody trains and that only products read can
be rounded once and for all: the results are the same bit for bit, in half the memory. Norms, embeddings and whatever
else autocast leaves alone stay float32, as they are in a network that is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.diffusion.denoiser import Denoiser, base
from emd_fast.fusion.fused import kind_of
from emd_fast.fusion.layers import Layer, Rounded
from emd_fast.fusion.network import Conditioning, plain_layers
from emd_fast.fusion.packed import Packed

# Under some conditions they hand their layers' weights to a kernel of their own, which wants one dtype.
_READ_BY_OTHERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# Of what is prepared of a weight: rounding, and an order of its rows. Not that it is normalised first.
_ROUNDING = (Rounded.prepare, Packed.prepare)


def weights_of_products(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that linear and convolution layers read as autocast rounds them, and nobody else reads.

    The first of all is not one of them: many networks take their dtype, and that of what they compute of time and
    condition, from it.
    """
    names = {id(layer): kind.rounds for layer, kind in _layers(network)}
    mine: dict[int, nn.Parameter] = {}
    others = {id(parameter) for parameter in _floating(network)[:1]}
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if name in names.get(id(module), ()) and parameter is not None and parameter.is_floating_point():
                mine[id(parameter)] = parameter
            else:
                others.add(id(parameter))
        if isinstance(module, _READ_BY_OTHERS):
            others |= {id(parameter) for parameter in module.parameters()}
    return [parameter for key, parameter in mine.items() if key not in others]


def _layers(network: nn.Module) -> Iterator[tuple[Any, type[Rounded]]]:
    """What rounds its weights and does nothing else with them, be it fused or not."""
    fused: Any = ((module, kind_of(module)) for module in network.modules())
    for layer, kind in (*plain_layers(network), *fused):
        if kind is Conditioning and type(layer)._emd_fast_base.forward is nn.Linear.forward:
            kind = Layer
        if kind is not None and issubclass(kind, Rounded) and kind.prepare in _ROUNDING:
            yield layer, kind


def _floating(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.is_floating_point()]


def rounded(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """A frozen copy, in eval mode, whose `weights_of_products` are of this dtype.

    It shares the memory of everything else with the original, which stays as it is: what was rounded is freed with the
    original. Called outside of autocast it opens that of this dtype. A denoiser without such weights is returned
    itself.

    Args:
        denoiser: bare or wrapped by torch.compile; on any device, the meta device too.
    """
    products = {id(parameter) for parameter in weights_of_products(denoiser)}
    if not products:
        return denoiser
    # What deepcopy finds in its memo it takes for copied.
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in denoiser.buffers()}
    for parameter in denoiser.parameters():
        to = dtype if id(parameter) in products else _at_least_float32(parameter)
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(to), requires_grad=False)
    copied = copy.deepcopy(denoiser, memo)
    base(copied).rounded_to = dtype
    return copied.eval()


def trainable(denoiser: Denoiser) -> Denoiser:
    """A copy with float32 weights to start a training from, whatever those of the original are."""
    copied = copy.deepcopy(denoiser)
    base(copied).rounded_to = None
    for parameter in copied.parameters():
        if parameter.dtype != (wide := _at_least_float32(parameter)):
            parameter.data = parameter.detach().to(wide)
    return copied


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
