"""Casts a frozen network's matmul and convolution weights to bf16 once, not on every pass.

Under autocast, matmuls and convolutions cast their float32 weights to the compute dtype. Weights
that are not trained and that only these layers read can be cast once: the results are the same bit
for bit, and the weights take half the memory. Norms, embeddings and everything else that autocast
leaves alone stay float32, as in a network that is trained.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.cache.layers import CastWeight, QKVWeight
from emd_fast.diffusion.denoiser import Denoiser, unwrap
from emd_fast.fusion.fused_class import kind_of
from emd_fast.fusion.layers import Layer
from emd_fast.fusion.whole_network import Conditioning, plain_layers

# These modules may pass their layers' weights to a fused kernel, which requires one dtype.
_READ_BY_OTHERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# Layers with these methods only cast their weight and permute its rows. Layers that normalise it
# first (EDM2) read it in float32.
_CASTS = (CastWeight.prepare, QKVWeight.prepare)


def matmul_weights(network: nn.Module) -> list[nn.Parameter]:
    """Finds the parameters that only linear and convolution layers read, which autocast would cast.

    The first parameter of the network is never included. Many networks take from it their dtype,
    and the dtype in which they compute the embeddings of time and condition.
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


def _layers(network: nn.Module) -> Iterator[tuple[Any, type[CastWeight]]]:
    """Layers, fused or not, that cast their weights and do nothing else with them."""
    own: Any = ((module, type(module)) for module in network.modules())
    for layer, kind in (*plain_layers(network), *own):
        if kind_of(layer) is Conditioning and kind._emd_fast_base.forward is nn.Linear.forward:
            kind = Layer
        if issubclass(kind, CastWeight) and kind.prepare in _CASTS:
            yield layer, kind


def _floating(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.is_floating_point()]


def cast_weights(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """Returns a frozen copy in eval mode whose `matmul_weights` have this dtype.

    The original stays unchanged. The copy shares the memory of all other tensors with it, so that
    the float32 weights are freed once the caller drops the original. Called outside autocast, the
    copy enables autocast to `dtype` itself. A denoiser without such weights is returned as it is.

    Args:
        denoiser: bare or wrapped by torch.compile; on any device, including meta.
        dtype: compute dtype of the matmuls and convolutions.
    """
    cast = {id(parameter) for parameter in matmul_weights(denoiser)}
    if not cast:
        return denoiser
    # deepcopy does not copy what its memo already holds.
    memo: dict[int, Tensor] = {id(buffer): buffer for buffer in denoiser.buffers()}
    for parameter in denoiser.parameters():
        to = dtype if id(parameter) in cast else _at_least_float32(parameter)
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(to), requires_grad=False)
    copied = copy.deepcopy(denoiser, memo)
    unwrap(copied).weights_dtype = dtype
    return copied.eval()


def trainable(denoiser: Denoiser) -> Denoiser:
    """Returns a copy with (at least) float32 weights, to start training from."""
    copied = copy.deepcopy(denoiser)
    unwrap(copied).weights_dtype = None
    for parameter in copied.parameters():
        if parameter.dtype != (wide := _at_least_float32(parameter)):
            parameter.data = parameter.detach().to(wide)
    return copied


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
