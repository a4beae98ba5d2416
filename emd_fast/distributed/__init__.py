"""The process group, the sharding of networks over it, and collectives on plain values.

Reading order: group.py, agreement.py, modes.py, sharding.py, fsdp.py, borrowing.py,
trainable_parameters.py, rows.py.
Nothing here knows of the algorithm.
"""

from emd_fast.distributed.agreement import AsyncMax, FailedOnMain, GroupError, check_same, on_main, raise_together
from emd_fast.distributed.borrowing import Borrowers
from emd_fast.distributed.fsdp import gathered, gathers_by_block, is_fsdp, is_sharded, sync_gradients
from emd_fast.distributed.group import (
    LostRank,
    barrier,
    default_device,
    is_main,
    local_size,
    process_group,
    rank,
    share,
    world_size,
)
from emd_fast.distributed.modes import check_group, make_mesh, resolve
from emd_fast.distributed.sharding import blocks_of, broadcast, device_of, offload_policy, shard
from emd_fast.distributed.trainable_parameters import TrainableParameters, local

__all__ = [
    "AsyncMax",
    "Borrowers",
    "FailedOnMain",
    "GroupError",
    "LostRank",
    "TrainableParameters",
    "barrier",
    "blocks_of",
    "broadcast",
    "check_group",
    "check_same",
    "default_device",
    "device_of",
    "gathered",
    "gathers_by_block",
    "is_fsdp",
    "is_main",
    "is_sharded",
    "local",
    "local_size",
    "make_mesh",
    "offload_policy",
    "on_main",
    "process_group",
    "raise_together",
    "rank",
    "resolve",
    "shard",
    "share",
    "sync_gradients",
    "world_size",
]
