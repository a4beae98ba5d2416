"""fuse, fusion_report and unfuse. A plan for each module comes first, then the change."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from emd_fast.fusion import compiled_blocks, diffusers_blocks, edm2_blocks, edm_blocks, small_unet_blocks
from emd_fast.fusion.fused_class import STATE, Fused, kind_of
from emd_fast.fusion.geglu import GEGLU
from emd_fast.fusion.layer_norm import LayerNorm
from emd_fast.fusion.layers import Rounded
from emd_fast.fusion.layout import name_of, restore, set_layout
from emd_fast.fusion.norm import FoldedSiLU, Norm, silu_behind_norm
from emd_fast.fusion.summary import SUPPORTED, FusionReport, Part
from emd_fast.fusion.whole_network import Conditioning, Network, conditioning_layers, plain_layers
from emd_fast.ops import flops

logger = logging.getLogger("emd_fast")

_KINDS: tuple[type[Fused], ...] = (
    Network,
    diffusers_blocks.ResnetBlock,
    diffusers_blocks.Attention,
    GEGLU,
    diffusers_blocks.Transformer,
    edm_blocks.Block,
    edm2_blocks.Block,
    small_unet_blocks.ResidualBlock,
    small_unet_blocks.SelfAttention,
    Norm,
)
# Blocks whose forward is ours; the others are compiled by the class of the block that repeats.
_COMPILED = (
    diffusers_blocks.ResnetBlock,
    edm_blocks.Block,
    edm2_blocks.Block,
    small_unet_blocks.ResidualBlock,
)
# Layers that compute what they did.
_LAYERS = (Rounded, LayerNorm)


@dataclass
class _Step:
    path: str
    module: nn.Module
    kind: type[Fused]
    state: dict[str, Any] = field(default_factory=dict)


def fuse(
    network: nn.Module,
    *,
    memory_format: torch.memory_format | str | None = "auto",
    compile: bool | dict[str, Any] = False,
    strict: bool = False,
) -> nn.Module:
    """Makes a network's forward pass, and its backward pass to the input, fast.

    emd_fast.ops serves group norms, what surrounds them, and attention; see docs/fuse.md.
    Parameters stay, and results agree to rounding. A fused network can be copied, pickled, sharded
    and compiled. `unfuse` undoes it.

    Args:
        network: diffusers' UNet2DModel and UNet2DConditionModel, NVlabs' networks of EDM and EDM2,
            emd_fast's own, alone or inside another module; of any other the parts that are known.
        memory_format: of the images that the network is given, and of the weights of convolutions.
            "auto" is torch.channels_last for images and for weights on a GPU, and leaves those on
            a CPU; None leaves both. Parameters stay the same objects.
        compile: True compiles the repeated blocks by torch.compile when they first run; a dict is
            its arguments, and `recompile_limit`, the number of sizes for which a block is compiled.
        strict: raise where a norm or attention is left, instead of reporting it.

    Returns:
        The same module. One that is fused already is returned as it is.

    Raises:
        TypeError: not a module, or an unknown memory_format or compile.
        ValueError: groups that do not divide the channels, parameters on several devices, heads of
            more than 256 dimensions; with strict, also where something is left or there is nothing
            to fuse. Nothing is changed then.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be an nn.Module, got {type(network).__name__}")
    if memory_format not in ("auto", None, torch.channels_last, torch.contiguous_format):
        raise TypeError(f"memory_format must be 'auto', None or a torch.memory_format, got {memory_format!r}")
    if not isinstance(compile, (bool, dict)):
        raise TypeError(f"compile must be a bool or a dict, got {type(compile).__name__}")
    if any(_is_fused(module) for module in network.modules()):
        logger.info("%s is fused already", type(network).__name__)
        return network
    _check_devices(network)
    flops.register()
    steps, left = _plan(network)
    for step in steps:
        if issubclass(step.kind, Network):
            step.state["memory_format"] = name_of(memory_format)
    if compile is not False:
        steps = _compiled(network, steps, {} if compile is True else compile)
    done = any(not issubclass(step.kind, _LAYERS) for step in steps)
    if strict and (left or not done):
        what = "\n".join(f"  {part.path or 'the network itself'} ({part.name}): {part.note}" for part in left)
        raise ValueError(f"fuse(strict=True) would leave:\n{what}" if left else _nothing(network))
    if not done:
        warnings.warn(_nothing(network), stacklevel=2)
        return network
    for step in steps:
        step.kind.fuse(step.module, **step.state)
    set_layout(network, memory_format)
    logger.info(fusion_report(network).summary)
    return network


def fuse_known(network: nn.Module, *, compile: bool = False, sizes: int = 1) -> nn.Module:
    """`fuse` without the warning for a network of which nothing is known.

    Args:
        sizes: number of sizes of a sample that blocks are compiled for, each as often as one alone may be.
    """
    limit = {"recompile_limit": sizes * compiled_blocks.RECOMPILE_LIMIT} if compile and sizes > 1 else {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="nothing to fuse")
        return fuse(network, compile=limit or compile)


def unfuse(network: nn.Module) -> nn.Module:
    """Undoes fuse(): restores classes, attention processors and memory formats.

    Returns the same module.

    Raises:
        ValueError: a fused module has been sharded since (its class is FSDP2's now). Nothing is
            changed then.
    """
    for path, module in network.named_modules():
        kind = kind_of(module)
        if kind is not None and "_emd_fast_base" not in vars(type(module)):
            raise ValueError(f"{path or 'the network'} was sharded after fuse(): it cannot be unfused")
    _undo(network)
    return network


def fusion_report(network: nn.Module) -> FusionReport:
    """What is fused of a network, and which norms and attention are left, and why."""
    fused, layers, left = [], [], []
    for path, module in network.named_modules():
        kind = kind_of(module)
        if kind is not None and issubclass(kind, _LAYERS):
            layers.append(Part(path, type(module).__name__, kind.note(module)))
            continue
        if kind is None and diffusers_blocks.Attention.recognises(module) and _is_fused(module):
            kind = diffusers_blocks.Attention
        if kind is not None:
            compiled = kind is not compiled_blocks.Repeated and "compile" in vars(module).get(STATE, {})
            fused.append(Part(path, type(module).__name__, kind.note(module) + (", compiled" if compiled else "")))
        elif (reason := _reason(module)) is not None or any(kind.recognises(module) for kind in _KINDS):
            left.append(Part(path, type(module).__name__, reason or "known; fuse() was not called since it is there"))
    return FusionReport(type(network).__name__, tuple(fused), tuple(left), tuple(layers))


# The plan -------------------------------------------------------------------------------------------------------------


def _plan(network: nn.Module) -> tuple[list[_Step], list[Part]]:
    """What becomes of each module, outer ones first; and what is left."""
    steps: dict[int, _Step] = {}
    left = []
    paths = {id(module): path for path, module in network.named_modules()}
    for path, module in network.named_modules():
        kind = next((kind for kind in _KINDS if kind.recognises(module)), None)
        if kind is not None:
            try:
                kind.check(module)
            except ValueError as error:
                raise ValueError(f"{path or type(network).__name__}: {error}") from None
            if kind.why_not(module) is None:
                steps[id(module)] = _Step(path, module, kind)
                continue
        if (reason := _reason(module)) is not None:
            left.append(Part(path, type(module).__name__, reason))
    for norm, activation in silu_behind_norm(network):
        if id(norm) in steps:
            steps[id(norm)].state["activation"] = "silu"
            steps[id(activation)] = _Step(paths[id(activation)], activation, FoldedSiLU)
    for layer in conditioning_layers(network):
        steps.setdefault(id(layer), _Step(paths[id(layer)], layer, Conditioning))
    for layer, kind in plain_layers(network) if steps else ():
        steps.setdefault(id(layer), _Step(paths[id(layer)], layer, kind))
    for block in [step.module for step in steps.values() if step.kind is edm_blocks.Block]:
        projection = steps.get(id(block.qkv)) if block.num_heads else None
        if projection is not None and (kind := edm_blocks.packed_kind(block, projection.kind)):
            projection.kind, projection.state["heads"] = kind, block.num_heads
    return list(steps.values()), left


def _reason(module: nn.Module) -> str | None:
    """Why a module stays as it is, None for one that is fused and for any other module."""
    for kind in _KINDS:
        if kind.recognises(module):
            return kind.why_not(module)
    if isinstance(module, nn.MultiheadAttention) or (
        "attention" in type(module).__name__.lower() and any(True for _ in module.parameters(recurse=False))
    ):
        return "attention of a kind that is not known"
    return None


def _compiled(network: nn.Module, steps: list[_Step], options: dict[str, Any]) -> list[_Step]:
    planned = {id(step.module) for step in steps}
    paths = {id(module): path for path, module in network.named_modules()}
    blocks = [step for step in steps if step.kind in _COMPILED]
    inside = {id(part) for step in blocks for part in step.module.modules()}
    for module in network.modules():
        if diffusers_blocks.takes_keys_and_values(module):
            blocks.append(_Step(paths[id(module)], module, diffusers_blocks.TransformerBlock))
            inside.update(id(part) for part in module.modules())
    for module in compiled_blocks.conditioned(network):
        blocks.append(_Step(paths[id(module)], module, compiled_blocks.ConditionedBlock))
        inside.update(id(part) for part in module.modules())
    for module in compiled_blocks.repeated(network):
        if id(module) not in planned and not any(id(part) in inside for part in module.modules()):
            blocks.append(_Step(paths[id(module)], module, compiled_blocks.Repeated))
    for step in blocks:
        # A graph break is a fault in a known block only. Sizes are fixed over a run.
        fullgraph = step.kind is not compiled_blocks.Repeated
        frozen = compiled_blocks.frozen_options({"fullgraph": fullgraph, "dynamic": False, **options})
        step.state.update(compile=frozen, structure=compiled_blocks.structure(step.module))
    return [*(step for step in steps if step.kind not in _COMPILED), *blocks]


def _check_devices(network: nn.Module) -> None:
    devices = {str(tensor.device) for tensor in (*network.parameters(), *network.buffers())}
    if len(devices) > 1:
        raise ValueError(f"the network's parameters must be on one device, got {', '.join(sorted(devices))}")


def _nothing(network: nn.Module) -> str:
    return f"nothing to fuse in {type(network).__name__}; known are {SUPPORTED}"


# The change -----------------------------------------------------------------------------------------------------------


def _is_fused(module: nn.Module) -> bool:
    processor = getattr(module, "processor", None)
    return kind_of(module) is not None or isinstance(processor, diffusers_blocks.Processor)


def _undo(network: nn.Module) -> None:
    restore(network)
    for module in [module for module in network.modules() if _is_fused(module)]:
        (kind_of(module) or diffusers_blocks.Attention).unfuse(module)
