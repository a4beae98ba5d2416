"""What a rank holds of a network's parameters: what an optimizer works on, and a checkpoint writes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emd_fast.distributed import group


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it: the tensor itself, or the local part of a DTensor, sharing its memory."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else tensor


class Shards:
    """What this rank holds of the trainable parameters of a network: what an optimizer works on.

    For a sharded network these are plain tensors on the memory of its shards, so that any optimizer will do; otherwise
    the parameters themselves.

    Args:
        network: spread by `shard`, or plain.

    Raises:
        ValueError: nothing in it requires a gradient.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError(f"{type(network).__name__} has no parameters to train")
        self.names = [name for name, _ in trained]
        self.whole = [p for _, p in trained]
        self.parameters = [p if (own := local(p)) is p else nn.Parameter(own) for p in self.whole]
        self.last_bad = torch.full((), -1, dtype=torch.int64, device=self.parameters[0].device)
        self._indices: Tensor | None = None

    def clear_gradients(self) -> None:
        for whole, own in zip(self.whole, self.parameters, strict=True):
            whole.grad = own.grad = None

    def reduce_gradients(self) -> None:
        """The gradients of all ranks, summed, in `parameters`: one all-reduce a dtype for what every rank holds whole;
        what is sharded has been reduced in the backward pass."""
        for whole, own in zip(self.whole, self.parameters, strict=True):
            if own is not whole:
                own.grad = None if whole.grad is None else local(whole.grad)
        if group.world_size() > 1:
            gradients = [g for i, g in self._gradients() if not self._is_part(i)]
            for dtype in dict.fromkeys(g.dtype for g in gradients):
                some = [g for g in gradients if g.dtype == dtype]
                flat = torch.cat([g.reshape(-1) for g in some])
                dist.all_reduce(flat)
                parts = flat.split([g.numel() for g in some])
                torch._foreach_copy_(some, [part.view_as(g) for part, g in zip(parts, some, strict=True)])

    def gradient_norms(self) -> Tensor:
        """(n,) the norm of each tensor's gradient over all ranks, n those that have one; the same on every rank."""
        gradients = self._gradients()
        norms = torch.stack(list(torch._foreach_norm([g for _, g in gradients])))
        if (sharers := self._sharers()) is not None:
            # What every rank of them holds whole counts once.
            squares = norms.square()
            for place, (i, _) in enumerate(gradients):
                if not self._is_part(i):
                    squares[place] /= dist.get_world_size(sharers)
            dist.all_reduce(squares, group=sharers)
            norms = squares.sqrt()
        return norms

    def note_bad(self, norms: Tensor) -> None:
        """Remembers, on the device, the first tensor whose gradient is not finite."""
        bad = ~torch.isfinite(norms)
        if self._indices is None or len(self._indices) != len(norms):  # made once: copying them makes the host wait
            self._indices = torch.tensor([index for index, _ in self._gradients()], device=norms.device)
        first = self._indices.gather(0, bad.int().argmax(keepdim=True))[0]
        self.last_bad = torch.where(bad.any(), first, self.last_bad)

    def bad(self) -> str | None:
        """The name of that tensor, or None; asks the device."""
        index = int(self.last_bad)
        return None if index < 0 else self.names[index]

    def like(self, index: int, tensor: Tensor) -> Tensor:
        """A tensor of the optimizer for parameter `index` as part of a whole, where the parameter is one."""
        whole: Any = self.whole[index]
        if not hasattr(whole, "to_local") or tensor.shape != self.parameters[index].shape:
            return tensor
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            tensor,
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def _is_part(self, index: int) -> bool:
        """Whether this rank holds a part of parameter `index`, not the whole."""
        return self.parameters[index] is not self.whole[index]

    def _gradients(self) -> list[tuple[int, Tensor]]:
        return [(i, p.grad) for i, p in enumerate(self.parameters) if p.grad is not None]

    def _sharers(self) -> dist.ProcessGroup | None:
        """The ranks among which a tensor is split, or None."""
        first: Any = next((whole for i, whole in enumerate(self.whole) if self._is_part(i)), None)
        if first is None:
            return None
        split = [i for i, placement in enumerate(first.placements) if placement.is_shard()]
        return first.device_mesh.get_group(split[0]) if split else None
