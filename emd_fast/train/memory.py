"""Memory of a device in a step, by purpose, from the parameter counts of the networks."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from emd_fast import distributed
from emd_fast.config import EMDConfig
from emd_fast.train.adapters import NAMES
from emd_fast.train.parameter_counts import NETWORKS, ParameterCounts

GIB = 2**30
# Per parameter: two moments; in 8 bits, with a scale for each 256 values.
_OPTIMIZER_BYTES = {"adamw": 8.0, "apex_adamw": 8.0, "adamw_8bit": 2.03}


def memory(
    counts: ParameterCounts,
    config: EMDConfig,
    mode: str,
    devices: int,
    *,
    reduced: bool,
    gather: Mapping[str, str],
    shard_group: int = 0,
    activations: float = 0.0,
) -> dict[str, float]:
    """Peak bytes on each device during a step, by purpose.

    Args:
        counts, config, mode, devices, reduced, shard_group, activations: as for `run.plan.estimate`.
        gather: "phase" or "block" by network; not read where nothing is sharded.
    """
    trained = counts.generator + counts.fake_score
    compute = 2 if reduced else 4
    among = shards(mode, devices, shard_group)
    share = -(-config.batch_size // devices)
    samples = min(config.compute.micro_batch_size or share, share)
    if mode == "replicate" or devices == 1:
        found = {
            "weights": 4.0 * (counts.teacher + trained)
            - (4.0 - compute) * counts.matmul_weights
            - (compute * counts.quantised - counts.quantised_bytes),
            "gradients": 4.0 * trained,
            # All gradients of a network are summed in one buffer.
            "gathered": 4.0 * max(counts.generator, counts.fake_score) if devices > 1 else 0.0,
        }
    else:
        sharded = {name: getattr(counts, name) for name in NETWORKS if name not in counts.adapters}
        # With micro-batches the whole float32 gradient is kept until it is reduced once.
        whole = max((size for name, size in sharded.items() if name != "teacher"), default=0)
        waiting = whole if share > samples else counts.largest_block
        by_phase = sum(size for name, size in sharded.items() if gather[name] == "phase")
        # One network passes at a time.
        by_block = max(
            (counts.at_a_time.get(n, size) for n, size in sharded.items() if gather[n] == "block"), default=0
        )
        found = {
            "weights": (4.0 * counts.whole + compute * counts.teacher) / among + 4.0 * counts.small,
            "gradients": 4.0 * counts.whole / among + 4.0 * (waiting + counts.small),
            # All gradients of an adapter are summed in one buffer.
            "gathered": compute * (by_phase + by_block)
            + 4.0 * max((getattr(counts, name) for name in counts.adapters), default=0),
        }
    copies = {name: 1 if name in counts.adapters else among for name in NAMES}
    moments = _OPTIMIZER_BYTES[config.optimizer.name]
    found |= {
        "optimizer": sum(moments * getattr(counts, name) / copies[name] for name in NAMES),
        "average": 4.0 * counts.generator / copies["generator"],
        "activations": activations * samples,
    }
    away = offloaded(counts, config, mode, devices, reduced=reduced, shard_group=shard_group)
    return {name: size - away.get(name, 0.0) for name, size in found.items()}


def offloaded(
    counts: ParameterCounts, config: EMDConfig, mode: str, devices: int, *, reduced: bool, shard_group: int = 0
) -> dict[str, float]:
    """Bytes of one device that are in host memory, by purpose.

    Args:
        counts, config, mode, devices, reduced, shard_group: as for `memory`.
    """
    if mode == "replicate" or devices == 1:
        return {}
    among, away = shards(mode, devices, shard_group), config.parallelism.offload
    teacher = counts.teacher / among if "teacher" in away else 0.0
    fake_score = counts.fake_score / among if "fake_score" in away else 0.0
    return {
        "weights": 4.0 * fake_score + (2 if reduced else 4) * teacher,
        "gradients": 4.0 * fake_score,
        "optimizer": _OPTIMIZER_BYTES[config.optimizer.name] * fake_score,
    }


def shards(mode: str, devices: int, shard_group: int = 0) -> int:
    """Number of devices that share one copy of a network."""
    if mode == "replicate" or devices == 1:
        return 1
    return devices if mode == "fsdp" else shard_group or distributed.local_size()


def available(device: torch.device | str = "cpu") -> float:
    """Bytes of memory for one rank: that of its GPU, or its share of the host's."""
    if torch.device(device).type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / distributed.local_size()


def gib(size: float) -> str:
    """Bytes in GiB, with three digits."""
    return f"{size / GIB:.3g}"
