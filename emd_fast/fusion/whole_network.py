"""Known networks, and their layers that see time and condition only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emd_fast.cache.conditioning import one_pass, remember
from emd_fast.cache.layers import CastWeight
from emd_fast.fusion import edm2_blocks, edm_blocks, layers, layout
from emd_fast.fusion.fused_class import OVERRIDDEN, STATE, Fused, has, is_a, named
from emd_fast.fusion.layer_norm import LayerNorm
from emd_fast.fusion.published import is_published, unpublished

# The layers of each network that turn time and condition into embeddings. The blocks remember their
# own projections. The EDM networks of emd_fast.teachers remember their embeddings themselves.
_DIFFUSERS = ("time_proj", "time_embedding", "class_embedding", "add_time_proj", "add_embedding", "encoder_hid_proj")
# Of transformers with cross-attention to the text in every block.
_CROSS = ("caption_projection", "attn2.to_k", "attn2.to_v")
_EDM = ("map_noise", "map_label", "map_augment", "map_layer0", "map_layer1")
_EDM2 = ("emb_fourier", "emb_noise", "emb_label")
_SMALL = ("noise_embedding", "class_embedding", "embedding", "modulation")
_OWN = "emd_fast.teachers."
# (package, class): the embedding layers, by the ends of their names.
_KNOWN: dict[tuple[str, str], tuple[str, ...]] = {
    **{(_OWN, name): () for name in ("SongUNet", "DhariwalUNet", "EDM2UNet")},
    (_OWN, "SmallUNet"): _SMALL,
    **{("diffusers.", name): _DIFFUSERS for name in ("UNet2DModel", "UNet2DConditionModel")},
    **{("diffusers.", name): _CROSS for name in ("SanaTransformer2DModel", "PixArtTransformer2DModel")},
}
_PUBLISHED = {"SongUNet": _EDM, "DhariwalUNet": _EDM, "UNet": _EDM2}
# The attribute that holds the network of a preconditioner.
_INSIDE = {
    "EDMPrecond": "model",
    "VPPrecond": "model",
    "VEPrecond": "model",
    "iDDPMPrecond": "model",
    "Precond": "unet",
}


def _layers(module: nn.Module) -> tuple[str, ...] | None:
    """The names of its embedding layers, None for a module that is no known network."""
    for (package, name), known in _KNOWN.items():
        if is_a(module, name, package):
            return known
    return next((layers for name, layers in _PUBLISHED.items() if is_published(module, name)), None)


class Network(Fused):
    """A network of images or its preconditioner. All arguments but the first are time and condition."""

    does = "inside conditioning_cache, what depends on time and condition alone is computed once"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        # A preconditioner makes a new tensor of its noise level in each pass, so that its own pass
        # counts.
        for name, inside in _INSIDE.items():
            if has(module, inside, "sigma_data") and is_published(module, name):
                return _layers(getattr(module, inside)) is not None
        return _layers(module) is not None or cls.why_not(module) is not None

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        for package, name in _KNOWN:
            if named(module, name, package):
                return None if is_a(module, name, package) else OVERRIDDEN
        if not has(module, "enc", "dec"):
            return None
        return next((unpublished(module, name) for name in _PUBLISHED if named(module, name)), None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = super().forward
        name = "" if args else next(iter(kwargs.keys() & {"x", "sample"}), "")
        x = args[0] if args else kwargs.get(name)
        if not isinstance(x, Tensor):
            return own(*args, **kwargs)
        x = layout.of_images(x, self.__dict__[STATE].get("memory_format"))
        args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, name: x})
        if torch.compiler.is_compiling() or _draws_conditions(self):
            return own(*args, **kwargs)
        others = {key: value for key, value in kwargs.items() if key != name}
        with one_pass(self, (args[1:], others, tuple(x.shape), x.dtype, x.device)):
            return own(*args, **kwargs)


def _draws_conditions(network: Any) -> bool:
    """Whether two passes of the same condition may differ: dropped labels, dropout in an embedding."""
    return network.training and any(
        getattr(module, "label_dropout", 0) or (isinstance(module, nn.Dropout) and module.p)
        for module in network.modules()
    )


class Conditioning(Fused):
    """A layer that sees time and condition only."""

    does = "computed once inside conditioning_cache"

    @classmethod
    def recognises(cls, module: Any) -> bool:
        return False  # by the network that it belongs to: see conditioning_layers

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return remember(self, super().forward, *args, **kwargs)


def conditioning_layers(network: nn.Module) -> Iterator[nn.Module]:
    """Of every network inside that Network recognises."""
    for module in network.modules():
        names = _layers(module) or ()
        inside = tuple(f".{name}" for name in names if "." in name)  # of every block
        for path, layer in module.named_modules() if names else ():
            if (path in names or path.endswith(inside)) and "forward" not in vars(layer):
                yield layer


_PLAIN: tuple[type[Fused], ...] = (layers.Convolution, layers.Layer, LayerNorm)
_PLAIN_OF: dict[tuple[str, ...], tuple[type[Fused], ...]] = {
    _EDM: (edm_blocks.Conv, edm_blocks.Linear),
    _EDM2: (edm2_blocks.MPConv,),
}


def plain_layers(network: nn.Module) -> Iterator[tuple[nn.Module, type[Fused]]]:
    """Convolutions, linear layers and layer norms of PyTorch, EDM and EDM2, each with its kind."""
    for root in network.modules():
        own = _PLAIN_OF.get(_layers(root) or ())
        for module in root.modules() if own else (root,):
            for kind in own or _PLAIN:
                if not isinstance(module, CastWeight) and kind.recognises(module):
                    yield module, kind
                    break
