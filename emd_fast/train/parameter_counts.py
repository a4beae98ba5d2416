"""Parameter counts of the three networks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from emd_fast import distributed
from emd_fast.config import AdapterConfig
from emd_fast.train import adapters, quantised_base
from emd_fast.train.adapters import NAMES
from emd_fast.train.cast_weights import matmul_weights

NETWORKS = ("generator", "teacher", "fake_score")
# Blocks that FSDP2 has in memory in a forward pass: the one that computes, the buffer of its
# all-gather, which lives on until the next one's is copied out, and that of the next.
_BLOCKS_AT_A_TIME = 3


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts of the three networks. An analytic teacher has 0 parameters.

    Args:
        teacher, generator, fake_score: parameters of each network.
        largest_block: parameters of the largest block of generator and fake score.
        matmul_weights: parameters of the teacher that a bfloat16 run stores in bfloat16 where it
            does not shard (`emd_fast.train.cast_weights`).
        adapters: networks that are the teacher with an adapter; their count is that of the adapter.
        quantised: parameters of the teacher that are held in 8 or 4 bits.
        quantised_bytes: bytes that these take.
        at_a_time: parameters in memory at a time where a network is gathered by block, by network:
            those outside of blocks, and three of the largest block. All of a network that is not there.
    """

    teacher: int
    generator: int
    fake_score: int
    largest_block: int
    matmul_weights: int = 0
    adapters: tuple[str, ...] = ()
    quantised: int = 0
    quantised_bytes: float = 0.0
    at_a_time: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, teacher: nn.Module, generator: nn.Module, fake_score: nn.Module, adapter: AdapterConfig | None = None
    ) -> ParameterCounts:
        """Counts the parameters of networks on any device, including meta.

        Args:
            adapter: of the run; None for whole networks. Networks may have it already.

        Raises:
            ConfigError: targets of adapters that match nothing.
        """
        networks = {"generator": generator, "fake_score": fake_score}
        at_a_time = {name: _at_a_time(network) for name, network in {**networks, "teacher": teacher}.items()}
        adapted = adapter.networks if adapter is not None and adapter.rank else ()
        counts = {name: _count(network) for name, network in networks.items()}
        frozen, held = _count(teacher), {id(p) for p in teacher.parameters()}
        for name in adapted:
            assert adapter is not None
            if not any(id(p) in held for p in networks[name].parameters()):
                frozen += counts[name]  # a base of its own
            counts[name] = (
                _count(networks[name], trained=True)
                if adapters.has_adapter(networks[name])
                else adapters.count(networks[name], adapter)
            )
        whole = [network for name, network in networks.items() if name not in adapted]
        blocks = [_count(block) for network in whole for block in distributed.blocks_of(network)]
        largest = max(blocks, default=max((_count(network) for network in whole), default=0))
        cast = sum(p.numel() for p in matmul_weights(teacher))
        bits = (0, 0.0)
        if adapter is not None and adapter.base_dtype != "auto":
            bits = quantised_base.held(teacher, adapter.base_dtype)
        trained = counts["generator"], counts["fake_score"]
        return cls(frozen, *trained, largest, cast, tuple(adapted), *bits, at_a_time)

    @property
    def whole(self) -> int:
        """Parameters of the trained networks that have no adapter."""
        return sum(getattr(self, name) for name in NAMES if name not in self.adapters)

    @property
    def small(self) -> int:
        """Parameters of the adapters."""
        return sum(getattr(self, name) for name in self.adapters)


def _count(network: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)


def _at_a_time(network: nn.Module) -> int:
    whole, blocks = _count(network), [_count(block) for block in distributed.blocks_of(network)]
    return min(whole, whole - sum(blocks) + _BLOCKS_AT_A_TIME * max(blocks, default=0))
