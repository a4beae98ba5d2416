"""Parallel modes (replicate, fsdp, hybrid) and their device meshes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from emd_fast.distributed import group
from emd_fast.distributed.agreement import GroupError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MODES = ("auto", "replicate", "fsdp", "hybrid")
# In parameters. A network of this size has 16 GB of float32 weights, gradients and AdamW state.
REPLICATED_UP_TO = 1_000_000_000


def resolve(mode: str, parameters: int, ranks: int = 0) -> tuple[str, str]:
    """Resolves "auto" to a mode for this number of parameters. Returns the mode and the reason.

    Args:
        ranks: number of ranks; the world size when 0.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}")
    ranks = ranks or group.world_size()
    if ranks == 1:
        return "replicate", "one process"
    if mode != "auto":
        return mode, "asked for"
    size = f"{parameters / 1e6:,.1f} million parameters"
    limit = f"{REPLICATED_UP_TO / 1e6:,.0f} million"
    if parameters <= REPLICATED_UP_TO:
        return "replicate", f"{size}, of up to {limit} every rank holds a whole copy"
    if 1 < group.local_size() < ranks:
        return "hybrid", f"{size}, more than {limit}: shards within a machine, copies across machines"
    return "fsdp", f"{size}, more than {limit}: every rank holds a shard"


def check_group(ranks: int, group_size: int) -> None:
    """Checks that `group_size` divides `ranks`.

    Raises:
        GroupError: it does not.
    """
    if group_size < 1 or ranks % group_size:
        raise GroupError(f"shard_group must divide the {ranks} ranks, got {group_size}")


def make_mesh(mode: str, device: torch.device | str, group_size: int = 0) -> DeviceMesh | None:
    """Device mesh of a mode: None for "replicate", one dimension for "fsdp", two for "hybrid".

    Args:
        group_size: number of ranks that share one copy ("hybrid"); the ranks of one machine when
            0.

    Raises:
        GroupError: the group size does not divide the number of ranks.
    """
    if mode == "replicate":
        return None
    from torch.distributed.device_mesh import init_device_mesh

    kind = torch.device(device).type
    if mode == "fsdp":
        return init_device_mesh(kind, (group.world_size(),), mesh_dim_names=("shard",))
    size = group_size or group.local_size()
    check_group(group.world_size(), size)
    return init_device_mesh(kind, (group.world_size() // size, size), mesh_dim_names=("replicate", "shard"))
