"""Networks that share the parameters of another one, while that one is moved or sharded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from emd_fast.distributed.fsdp import Use, gather_by_block, gathers_by_block, is_sharded, lend
from emd_fast.distributed.sharding import apply_fsdp

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import OffloadPolicy


class Borrowers:
    """Networks with parameters and buffers of a lender, noted before the lender is sharded.

        borrowers = Borrowers(teacher, [fake_score])
        shard(teacher, ...)          # may put other tensors in place of its parameters
        borrowers.follow()

    Args:
        lender: not sharded yet.
        networks: modules that hold tensors of the lender.
    """

    def __init__(self, lender: nn.Module, networks: Sequence[nn.Module]) -> None:
        self._lender = lender
        owner: dict[int, Use] = {}
        for module in lender.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        owner.setdefault(id(tensor), (module, name))
        self._uses: list[tuple[nn.Module, dict[Use, list[Use]]]] = []
        for network in networks:
            uses: dict[Use, list[Use]] = {}
            for module in network.modules():
                for table in (module._parameters, module._buffers):
                    for name, tensor in table.items():
                        if tensor is not None and id(tensor) in owner:
                            uses.setdefault(owner[id(tensor)], []).append((module, name))
            self._uses.append((network, uses))

    def follow(self, mesh: DeviceMesh | None = None, offload: OffloadPolicy | None = None) -> None:
        """Gives the networks the tensors that the lender has now.

        If the lender is sharded, the networks are gathered with it. If it gathers by block, each of
        them gathers by block too, from the same shards.

        Args:
            mesh, offload: those of the lender; needed where it gathers by block.
        """
        for network, uses in self._uses:
            if gathers_by_block(self._lender):
                _shard_without_memory(network, uses, mesh, offload)
            for (lender, name), borrowers in uses.items():
                for module, its_name in borrowers:
                    if name in lender._parameters:
                        module._parameters[its_name] = lender._parameters[name]
                    else:
                        module._buffers[its_name] = lender._buffers[name]
            if gathers_by_block(self._lender):
                gather_by_block(network)  # which takes over the shards that it finds
            elif is_sharded(self._lender):
                lend(self._lender, network, uses)


def _shard_without_memory(
    network: nn.Module, uses: Mapping[Use, Sequence[Use]], mesh: DeviceMesh | None, offload: OffloadPolicy | None
) -> None:
    """Applies FSDP2 to a network, with tensors on the meta device where the lender's shards will be."""
    stand_ins = set()
    for (lender, name), borrowers in uses.items():
        lent = lender._parameters.get(name)
        if lent is not None and hasattr(lent, "device_mesh"):
            stand_in = nn.Parameter(torch.empty(lent.shape, dtype=lent.dtype, device="meta"), requires_grad=False)
            stand_ins.add(stand_in)
            for module, its_name in borrowers:
                module._parameters[its_name] = stand_in
    apply_fsdp(network, mesh, whole_on_every_rank=set(network.parameters()) - stand_ins, offload=offload)
