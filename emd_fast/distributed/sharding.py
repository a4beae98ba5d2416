"""Spreading a network over the process group, from the weights that rank 0 has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emd_fast.distributed import group
from emd_fast.distributed.fsdp import is_sharded
from emd_fast.distributed.modes import make_mesh, resolve
from emd_fast.distributed.shards import local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(
    network: nn.Module,
    mode: str = "auto",
    *,
    precision: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    device: torch.device | str | None = None,
    blocks: Sequence[nn.Module] | None = None,
) -> nn.Module:
    """Spreads a network over the process group, in place, starting from the weights of rank 0.

    "replicate": a whole copy on every rank; `Shards.reduce_gradients` sums the gradients, once. "fsdp": FSDP2, block by
    block; "hybrid": the same within groups of ranks, copies across. "auto": `resolve`. In one process nothing happens.

    Args:
        network: its parameters on the device they are to live on. Or, on all ranks but the first, on the meta device:
            then no other rank ever holds the whole of it, and the first need not have it on its GPU.
        precision: what FSDP2 computes and gathers in, torch.bfloat16 or None for the parameters' own; weights,
            gradients and their reduction stay float32. A network whose parameters all are frozen is converted to it
            and has no float32 copy.
        mesh: of `make_mesh`; networks of one trainer share it. Made here when None.
        device: where it is to live; `device_of` when None.
        blocks: the modules that are gathered one at a time; `blocks_of` when None.

    Returns:
        The network. FSDP2 networks are left as they are.

    Raises:
        ValueError: an unknown mode.
    """
    parameters = list(network.parameters())
    mode, _ = resolve(mode, sum(p.numel() for p in parameters))
    if group.world_size() == 1 or is_sharded(network):
        return network
    device = device_of(network) if device is None else torch.device(device)
    whole = _leave_to_rank_0(network)
    if mode == "replicate" or not parameters:
        if whole is not None:
            _take_from_rank_0(network, whole, device)
        _broadcast(network)
        return network
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if whole is None:
        _broadcast(network)
    if precision is not None and not any(p.requires_grad for p in parameters):
        for parameter in network.parameters():
            parameter.data = parameter.data.to(precision)
    for parameter in network.parameters():
        # FSDP2 takes no weight in channels_last, as `fuse` lays them out on a GPU; its gathered copies are contiguous.
        parameter.data = parameter.data.contiguous()
    # Inputs are not cast: a time in bfloat16 has three digits. Autocast casts where a matrix product wants it.
    policy = MixedPrecisionPolicy(
        param_dtype=precision,
        reduce_dtype=torch.float32 if precision is not None else None,
        cast_forward_inputs=False,
    )
    mesh = mesh if mesh is not None else make_mesh(mode, device)
    # A number alone cannot be split (EDM2 has some): every rank keeps it, and `Shards` sums its gradient.
    numbers = {p for p in network.parameters() if not p.dim()}
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": numbers}
    for module in blocks_of(network) if blocks is None else blocks:
        fully_shard(module, **options)
    # True also at the root: left gathered after a pass without gradients, it would miss the next optimizer step.
    fully_shard(network, **options, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            # Sums, as for "replicate": each rank's loss is already its part of the mean over the global batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    if whole is not None:
        _take_from_rank_0(network, whole, device)
        _broadcast(network)
    return network


def device_of(network: nn.Module) -> torch.device:
    """Where its first tensor lives. Where some rank has it on the meta device: this process's GPU, or the CPU where
    there is none. All ranks call it alike."""
    tensor = next(iter(_named(network).values()), torch.zeros(()))
    if not _anywhere(tensor.is_meta):
        return tensor.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _anywhere(holds: bool) -> bool:
    """Whether it holds on any rank."""
    if group.world_size() == 1:
        return holds
    flag = torch.tensor([int(holds)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _leave_to_rank_0(network: nn.Module) -> dict[str, Tensor] | None:
    """None where every rank has the network. Else it is on the meta device afterwards, on all of them, and rank 0 gets
    what was in it."""
    tensors = _named(network)
    if not _anywhere(any(t.is_meta for t in tensors.values())):
        return None
    if group.is_main() and any(t.is_meta for t in tensors.values()):
        raise ValueError("a network on the meta device must have its weights on rank 0")
    held = {name: tensor.detach() for name, tensor in tensors.items()} if group.is_main() else {}
    network.to("meta")
    return held


@torch.no_grad()
def _take_from_rank_0(network: nn.Module, whole: dict[str, Tensor], device: torch.device) -> None:
    """Gives a network on the meta device its memory; its shards, one tensor at a time, from the whole ones that rank 0
    holds; what is not sharded is left to `_broadcast`."""
    network.to_empty(device=device)
    tensor: Any
    for name, tensor in _named(network).items():
        own = local(tensor)
        if hasattr(tensor, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            main = group.is_main()
            full = whole.pop(name).to(own) if main else torch.empty(tensor.shape, dtype=own.dtype, device=own.device)
            own.copy_(local(distribute_tensor(full.contiguous(), tensor.device_mesh, tensor.placements)))
        elif group.is_main():
            own.copy_(whole.pop(name))


def _named(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those that a state dict leaves out too."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The entries of the outermost module lists: what networks repeat, and hence what is worth gathering alone."""
    found: list[nn.Module] = []

    def visit(module: nn.Module, listed: bool) -> None:
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                visit(child, True)
            elif not listed:
                visit(child, False)
            elif any(True for _ in child.parameters()):
                found.append(child)

    visit(network, False)
    return found


@torch.no_grad()
def _broadcast(network: nn.Module) -> None:
    """What is not sharded of the parameters and buffers of rank 0, on every rank."""
    for tensor in _named(network).values():
        if group.world_size() == 1 or hasattr(tensor, "device_mesh"):
            continue
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, src=0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
