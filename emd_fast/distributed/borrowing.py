"""Networks that share the parameters of another one, while that one is moved or sharded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from emd_fast.distributed.fsdp import Use, is_sharded, lend


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

    def follow(self) -> None:
        """Gives the networks the tensors that the lender has now. They are gathered with it if it is sharded."""
        for network, uses in self._uses:
            for (lender, name), borrowers in uses.items():
                for module, its_name in borrowers:
                    if name in lender._parameters:
                        module._parameters[its_name] = lender._parameters[name]
                    else:
                        module._buffers[its_name] = lender._buffers[name]
            if is_sharded(self._lender):
                lend(self._lender, network, uses)
