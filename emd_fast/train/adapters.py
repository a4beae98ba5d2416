"""LoRA adapters through peft: generator and fake score as one frozen base with an adapter each.

Each network is a module of its own whose layers hold the very parameters of the teacher, and its
adapter beside them. Nothing is switched on or off between passes, so the networks can be used in any
order, compiled, captured and copied like separate ones, and the base takes memory once.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from emd_fast import ops
from emd_fast.config import AdapterConfig, ConfigError
from emd_fast.diffusion.denoiser import Denoiser
from emd_fast.io import quiet
from emd_fast.noise import Noise, NoiseStream
from emd_fast.train.quantised_base import dequantised

Module = TypeVar("Module", bound=nn.Module)

NAMES = ("generator", "fake_score")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SHOWN = 12  # names in a message


def sharing(module: Module) -> Module:
    """Returns a copy whose parameters and buffers are those of the original."""
    return copy.deepcopy(module, tensors_of(module))


def lasting_tensors(network: nn.Module) -> dict[int, Tensor]:
    """Tensors of a network with an adapter that training does not change, by id."""
    return {i: tensor for i, tensor in tensors_of(network).items() if not tensor.requires_grad}


def tensors_of(module: nn.Module) -> dict[int, Any]:
    """Parameters and buffers by id. As the memo of a deep copy, it makes the copy share them."""
    return {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}


def names_of(network: nn.Module, config: AdapterConfig) -> list[str]:
    """Names of the layers that get an adapter.

    Raises:
        ConfigError: a target that matches no layer; the message has the layers there are.
    """
    # A MultiheadAttention reads the weights of its layer without calling it.
    unseen = {id(part) for m in network.modules() if isinstance(m, nn.MultiheadAttention) for part in m.modules()}
    layers = [name for name, m in network.named_modules() if isinstance(m, _LAYERS) and id(m) not in unseen]
    if not config.targets:
        return [name for name in layers if _ends(name, _ATTENTION)] or layers
    for target in config.targets:
        if not any(_ends(name, (target,)) for name in layers):
            ends = list(dict.fromkeys(re.split(r"\.\d+\.", name)[-1] for name in layers))
            more = f" and {len(ends) - _SHOWN} more" if len(ends) > _SHOWN else ""
            raise ConfigError(
                f"adapter_targets names {target!r}, and no linear layer or convolution has a name that ends so: "
                f"there are {', '.join(ends[:_SHOWN])}{more}"
            )
    return [name for name in layers if _ends(name, config.targets)]


def _ends(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def count(network: nn.Module, config: AdapterConfig) -> int:
    """Number of parameters of an adapter of the network, from the shapes of its layers."""
    found = 0
    for name in names_of(network, config):
        weight: Any = network.get_submodule(name).weight
        found += config.rank * (weight[0].numel() + len(weight))
    return found


def add(network: nn.Module, config: AdapterConfig, name: str, seed: int) -> None:
    """Puts a float32 adapter into the layers of a network, in place. Only the adapter requires gradients then.

    It is on the meta device if the network is. A network that comes with adapters of peft keeps them,
    and gets no other.

    Args:
        name: of the adapter.
        seed: as for `initialise`.

    Raises:
        ConfigError: peft is not installed or refuses a layer; targets that match nothing.
    """
    peft = _peft()
    if has_adapter(network):
        for parameter in network.parameters():
            if parameter.requires_grad and parameter.itemsize < 4:
                parameter.data = parameter.data.float()
        return
    layers = names_of(network, config)
    if not layers:
        raise ConfigError(f"adapter_rank must be 0: the {name} has no linear layer and no convolution")
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        # peft takes a list as ends of names; these are whole names.
        target_modules="|".join(map(re.escape, layers)),
        lora_dropout=0.0,
    )
    try:
        peft.inject_adapter_in_model(lora, network, adapter_name=name, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(f"peft gives the {name} no adapter: {' '.join(str(error).split())}") from error
    for part, key, _ in _weights(network):
        meta: Any = part._parameters[key]
        part._parameters[key] = nn.Parameter(torch.empty_like(meta, dtype=torch.float32))
    first: Any = network.get_submodule(layers[0])
    device = first.base_layer.weight.device
    if device.type != "meta":
        initialise(network, device, seed)


def has_adapter(network: nn.Module) -> bool:
    """Whether a network has layers of peft."""
    return any(hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names") for module in network.modules())


@torch.no_grad()
def merged(network: Module) -> Module:
    """Returns a copy with the adapters added to the weights, in float32; a network without any as it is.

    Weights of a quantised base are those that its bits stand for.
    """
    if not has_adapter(network):
        return network
    copied = copy.deepcopy(network)
    dequantised(copied)
    for tensor in (*copied.parameters(), *copied.buffers()):
        if tensor.is_floating_point() and tensor.itemsize < 4:
            tensor.data = tensor.data.float()
    for parent in list(copied.modules()):
        for name, layer in list(parent.named_children()):
            if hasattr(layer, "base_layer"):
                layer.merge()  # type: ignore[operator]
                setattr(parent, name, layer.get_base_layer())  # type: ignore[operator]
    for module in copied.modules():
        if isinstance(module, Denoiser):
            module.weights_dtype = None  # the weights have the dtype of the others again
        vars(module).pop("peft_config", None)
    return copied


@torch.no_grad()
def initialise(network: nn.Module, device: torch.device, seed: int) -> None:
    """Allocates and fills the adapters that are on the meta device, from noise stream 13.

    A is uniform with the bound 1 / sqrt(fan-in), as in peft, and B is 0. The numbers are the same for
    every network, on every rank and machine. The substep of the noise is the index of the tensor.
    """
    noise = Noise(seed, device=device)
    for index, (part, key, first) in enumerate(_weights(network)):
        meta = part._parameters[key]
        assert meta is not None
        if not meta.is_meta:
            continue
        value = torch.zeros_like(meta, device=device)
        if first:
            drawn = ops.uniform(value.shape, noise, stream=NoiseStream.WEIGHTS, substep=index)
            value.copy_((2 * drawn - 1) / math.sqrt(value[0].numel()))
        part._parameters[key] = nn.Parameter(value, requires_grad=meta.requires_grad)


def _weights(network: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """(module, name, whether it is A) of every weight of LoRA."""
    for layer in network.modules():
        for table in ("lora_A", "lora_B"):
            for part in getattr(layer, table, {}).values():
                for key in part._parameters:
                    if part._parameters[key] is not None:
                        yield part, key, table == "lora_A"


def own_names(network: nn.Module, base: nn.Module) -> frozenset[str]:
    """Names of a network's tensors that are not those of the base: the adapter, usually."""
    held = tensors_of(base)
    named: dict[str, Tensor] = network.state_dict(keep_vars=True)
    return frozenset(name for name, tensor in named.items() if id(tensor) not in held)


def _peft() -> Any:
    quiet.import_with_torchao()
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ConfigError('adapter_rank needs peft: `pip install "emd_fast[adapters]"`, or rank 0') from error
    return peft
