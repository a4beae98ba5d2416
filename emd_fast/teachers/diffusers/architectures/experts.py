"""Two networks of one architecture as one: the first for times from a boundary on, the second for those below it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from emd_fast.cache.conditioning import same
from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.diffusers.architectures.form import Architecture
from emd_fast.teachers.diffusers.architectures.network import Network


class Experts(Network):
    """Two networks, of which each sample of a batch passes the one of its own time.

    The rows of a batch that needs both are grouped by network. The host waits for the number of rows:
    once for each batch of times, which are fixed in an E-step.

    A network that no row needs passes one patch, whose output counts 0 times, where its gradients are
    wanted or FSDP2 gathers it in its passes. All parameters then have a gradient, and all ranks make
    the same passes in the same order.

    Args:
        model: for training indices from the boundary on.
        second: for those below it.
        architecture: how both are called.
        boundary: a training index.
    """

    def __init__(self, model: nn.Module, second: nn.Module, architecture: Architecture, boundary: float) -> None:
        super().__init__(model, architecture)
        self.second, self.boundary = second, boundary

    def alone(self, below: bool) -> Network:
        """One of the networks, the first or that below the boundary, with the parameters of this one."""
        return Network(self.second if below else self.model, self.architecture)

    def below(self, index: Tensor) -> Tensor:
        """Whether a sample passes the second network, bool (B,) for training indices (B,)."""
        return index < self.boundary

    def forward(self, x: Tensor, index: Tensor, cond: Condition = None) -> Tensor:
        given = self.arguments(cond, len(x))
        if x.is_meta:  # both networks have the same shapes
            return self.architecture.call(self.model, x, index, given)
        order, back, first = same(self._order, index)
        mixed = 0 < first < len(x)
        parts = same(_split, order, first, index, given) if mixed else [(index, given)] * 2
        x = x[order] if mixed else x
        outputs, unused = [], []
        for network, rows, (times, conds) in zip((self.model, self.second), (x[:first], x[first:]), parts, strict=True):
            if len(rows):
                outputs.append(self.architecture.call(network, rows, times, conds))
            elif any(_counts(parameter) for parameter in network.parameters()):
                unused.append(self._one_patch(network, x, times, conds))
        output = torch.cat(outputs)[back] if mixed else outputs[0]
        return output + 0 * unused[0].sum() if unused else output

    def _order(self, index: Tensor) -> tuple[Tensor, Tensor, int]:
        """An order of the rows with those of the first network first, its inverse, and their number."""
        below = self.below(index)
        order = below.int().argsort(stable=True)
        return order, order.argsort(), len(index) - int(below.sum())

    def _one_patch(self, network: nn.Module, x: Tensor, index: Tensor, given: dict[str, Tensor]) -> Tensor:
        sides = self.architecture.patch[-(x.dim() - 2) :]
        # Of every sample: one pass of several networks counts on its parts.
        return self.architecture.call(network, x[(slice(None), slice(None), *map(slice, sides))], index, given)


def _counts(parameter: Tensor) -> bool:
    """Whether a gradient is wanted, or the parameter is sharded: FSDP2 then gathers it in the pass."""
    return (torch.is_grad_enabled() and parameter.requires_grad) or hasattr(parameter, "device_mesh")


def _split(
    order: Tensor, first: int, index: Tensor, given: dict[str, Tensor]
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Times and conditions of the first rows of an order, and of the others."""
    groups: list[tuple[Tensor, dict[str, Tensor]]] = [
        pytree.tree_map(lambda leaf, rows=rows: leaf[rows], (index, given)) for rows in (order[:first], order[first:])
    ]
    return groups
