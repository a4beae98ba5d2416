"""Replicates or shards a network over the process group, from the weights of rank 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emd_fast.distributed import group
from emd_fast.distributed.fsdp import gather_by_block, is_sharded
from emd_fast.distributed.modes import make_mesh, resolve
from emd_fast.distributed.trainable_parameters import local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import OffloadPolicy


def shard(
    network: nn.Module,
    mode: str = "auto",
    *,
    precision: torch.dtype | None = None,
    mesh: DeviceMesh | None = None,
    device: torch.device | str | None = None,
    blocks: Sequence[nn.Module] | None = None,
    gather: str = "phase",
    offload: bool = False,
) -> nn.Module:
    """Replicates or shards a network over the process group, in place, from the weights of rank 0.

    "replicate" puts a whole copy on every rank; `TrainableParameters.reduce_gradients` sums the
    gradients once per step. "fsdp" applies FSDP2 block by block. "hybrid" shards within groups of
    ranks and replicates across groups. "auto" is resolved by `resolve`. In one process the network
    is returned unchanged.

    Args:
        network: its parameters on the target device. On ranks other than 0 they may be on the meta
            device: no rank but 0 then ever holds the whole network, and rank 0 may keep it on the
            CPU.
        precision: dtype in which FSDP2 computes and gathers, torch.bfloat16 or None for the dtype
            of the parameters. Weights, gradients and reductions stay float32. A network without
            any trainable parameter is converted to it and keeps no float32 copy.
        mesh: result of `make_mesh`, shared by the networks of one trainer. Created here when None.
        device: the target device; `device_of(network)` when None.
        blocks: modules that are gathered one at a time; `blocks_of(network)` when None.
        gather: "phase": `gathered` holds the whole network. "block": every pass gathers the blocks
            one after the other, also inside `gathered`.
        offload: whether the shards are in host memory, pinned if the device is a GPU, with their
            gradients and the state of an optimizer. The optimizer's step is then one of the CPU.

    Returns:
        The network. Networks that already use FSDP2 are left unchanged.

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
        broadcast(_named(network).values())
        return network
    if whole is None:
        broadcast(_named(network).values())
    if precision is not None and not any(p.requires_grad for p in parameters):
        for parameter in network.parameters():
            parameter.data = parameter.data.to(precision)
    for parameter in network.parameters():
        # FSDP2 does not accept channels_last weights, which `fuse` makes on a GPU. Its gathered
        # copies are contiguous.
        parameter.data = parameter.data.contiguous()
    # FSDP2 cannot shard a 0-d parameter (EDM2 has some). Every rank keeps a copy, and
    # `TrainableParameters` sums its gradient.
    scalars = {p for p in network.parameters() if not p.dim()}
    mesh = mesh if mesh is not None else make_mesh(mode, device)
    policy = offload_policy(offload, device)
    apply_fsdp(network, mesh, whole_on_every_rank=scalars, precision=precision, blocks=blocks, offload=policy)
    if whole is not None:
        _take_from_rank_0(network, whole, device, offload)
        broadcast(_named(network).values())
    if gather == "block":
        gather_by_block(network)
    return network


def apply_fsdp(
    network: nn.Module,
    mesh: DeviceMesh | None,
    *,
    whole_on_every_rank: set[nn.Parameter],
    precision: torch.dtype | None = None,
    blocks: Sequence[nn.Module] | None = None,
    offload: OffloadPolicy | None = None,
) -> None:
    """Applies FSDP2 to the blocks of a network and to the network.

    Args:
        whole_on_every_rank: parameters that FSDP2 leaves alone.
        precision, blocks: as for `shard`.
        offload: result of `offload_policy`; shards stay on the device when None.
    """
    from torch.distributed import fsdp

    # Inputs are not cast: the time input would keep three digits in bfloat16. Autocast casts at
    # each matmul.
    policy = fsdp.MixedPrecisionPolicy(
        param_dtype=precision,
        reduce_dtype=torch.float32 if precision is not None else None,
        cast_forward_inputs=False,
    )
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": whole_on_every_rank}
    if offload is not None:
        options["offload_policy"] = offload
    for module in blocks_of(network) if blocks is None else blocks:
        fsdp.fully_shard(module, **options)
    # Also at the root: if it stayed gathered after a pass without gradients, it would miss the
    # next optimizer step.
    fsdp.fully_shard(network, **options, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, fsdp.FSDPModule):
            # Sum, as "replicate" does: each rank's loss is already its part of the mean over the
            # global batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def offload_policy(wanted: bool, device: torch.device) -> OffloadPolicy | None:
    """FSDP2's policy of shards in host memory, pinned for copies to a GPU; None if it is not wanted."""
    if not wanted:
        return None
    from torch.distributed.fsdp import CPUOffloadPolicy

    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


def device_of(network: nn.Module) -> torch.device:
    """Device of the network's first tensor.

    Where any rank has that tensor on the meta device: the GPU of this process, or the CPU without
    one. All ranks must call it.
    """
    tensor = next(iter(_named(network).values()), torch.zeros(()))
    if not _on_any_rank(tensor.is_meta):
        return tensor.device
    return group.default_device()


def _on_any_rank(condition: bool) -> bool:
    """Whether the condition is true on any rank."""
    if group.world_size() == 1:
        return condition
    flag = torch.tensor([int(condition)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _leave_to_rank_0(network: nn.Module) -> dict[str, Tensor] | None:
    """Moves a network that some rank has on the meta device to the meta device on every rank.

    Returns:
        None where every rank has the weights (nothing is moved). Otherwise the weights by name on
        rank 0, and an empty dict on the others.
    """
    tensors = _named(network)
    if not _on_any_rank(any(t.is_meta for t in tensors.values())):
        return None
    if group.is_main() and any(t.is_meta for t in tensors.values()):
        raise ValueError("a network on the meta device must have its weights on rank 0")
    held = {name: tensor.detach() for name, tensor in tensors.items()} if group.is_main() else {}
    network.to("meta")
    return held


@torch.no_grad()
def _take_from_rank_0(
    network: nn.Module, whole: dict[str, Tensor], device: torch.device, offload: bool = False
) -> None:
    """Allocates a network on the meta device and fills it from the weights of rank 0.

    Shards are distributed one tensor at a time. Tensors that are not sharded are filled on rank 0
    only; `broadcast` sends them on.

    Args:
        offload: whether shards are allocated in host memory.
    """
    tensor: Any
    if offload:
        # Shards first: FSDP2 pads and pins what it finds. The rest is on the device.
        network.to_empty(device="cpu")
        for tensor in _named(network).values():
            if not hasattr(tensor, "device_mesh"):
                tensor.data = torch.empty_like(tensor, device=device)
    else:
        network.to_empty(device=device)
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
    """Parameters and buffers by name, non-persistent buffers included."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """Entries of the outermost ModuleLists and ModuleDicts, usually the repeated blocks."""
    found: list[nn.Module] = []

    def visit(module: nn.Module, listed: bool) -> None:
        for child in module.children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                visit(child, True)
            elif listed:
                if any(True for _ in child.parameters()):
                    found.append(child)
            elif not hasattr(child, "base_layer"):  # the lists inside peft's layers hold adapters, not blocks
                visit(child, False)

    visit(network, False)
    return found


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Copies the values of rank 0 to every rank, in place. Sharded tensors are left as they are."""
    for tensor in tensors:
        if group.world_size() == 1 or hasattr(tensor, "device_mesh"):
            continue
        whole = tensor.detach().contiguous()
        dist.broadcast(whole, src=0)
        if whole.data_ptr() != tensor.data_ptr():
            tensor.copy_(whole)
