"""From one process to a cluster: the process group, how a network is spread over it, and what its ranks owe each other.

Reading order: group.py, agreement.py, modes.py, sharding.py, fsdp.py, shards.py, rows.py. Nothing here knows of the
algorithm.
"""

from emd_fast.distributed.agreement import Agreement, FailedOnMain, GroupError, check_same, on_main, raise_together
from emd_fast.distributed.fsdp import gathered, is_fsdp, is_sharded, sync_gradients
from emd_fast.distributed.group import LostRank, barrier, is_main, local_size, process_group, rank, share, world_size
from emd_fast.distributed.modes import check_group, make_mesh, resolve
from emd_fast.distributed.sharding import blocks_of, device_of, shard
from emd_fast.distributed.shards import Shards, local

__all__ = [
    "Agreement",
    "FailedOnMain",
    "GroupError",
    "LostRank",
    "Shards",
    "barrier",
    "blocks_of",
    "check_group",
    "check_same",
    "device_of",
    "gathered",
    "is_fsdp",
    "is_main",
    "is_sharded",
    "local",
    "local_size",
    "make_mesh",
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
