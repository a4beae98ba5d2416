"""Trainable parameters of one network on one rank, for the optimizer and the checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from emd_fast.distributed import group


def local(tensor: Tensor) -> Tensor:
    """Local part of a DTensor, sharing its memory. Any other tensor is returned as it is."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else tensor


class TrainableParameters:
    """The trainable parameters of a network as this rank's optimizer sees them.

    For a sharded network these are plain tensors that share the memory of its shards, so that any
    optimizer works on them. Otherwise they are the parameters themselves.

    Args:
        network: a network that `shard` has processed, or a plain one.

    Raises:
        ValueError: no parameter requires a gradient.
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
        """Sums the gradients over the ranks into the `grad` of `parameters`.

        Replicated parameters take one all-reduce per dtype. FSDP2 has reduced the sharded ones in
        the backward pass.
        """
        for whole, own in zip(self.whole, self.parameters, strict=True):
            if own is not whole:
                own.grad = None if whole.grad is None else local(whole.grad)
        if group.world_size() > 1:
            gradients = [g for i, g in self._gradients() if not self._is_sharded(i)]
            for dtype in dict.fromkeys(g.dtype for g in gradients):
                same = [g for g in gradients if g.dtype == dtype]
                flat = torch.cat([g.reshape(-1) for g in same])
                dist.all_reduce(flat)
                parts = flat.split([g.numel() for g in same])
                torch._foreach_copy_(same, [part.view_as(g) for part, g in zip(parts, same, strict=True)])

    def gradient_norms(self) -> Tensor:
        """Norm of each parameter's gradient over all ranks, (n,) for n parameters with a gradient.

        The result is the same on every rank.
        """
        gradients = self._gradients()
        # Shards in host memory have their gradients there; a parameter of one number is not sharded.
        device = self.last_bad.device
        norms = torch.stack([norm.to(device) for norm in torch._foreach_norm([g for _, g in gradients])])
        if (sharers := self._shard_group()) is not None:
            # A replicated gradient must count once, and the all-reduce adds it once per rank.
            squares = norms.square()
            for place, (i, _) in enumerate(gradients):
                if not self._is_sharded(i):
                    squares[place] /= dist.get_world_size(sharers)
            dist.all_reduce(squares, group=sharers)
            norms = squares.sqrt()
        return norms

    def note_bad(self, norms: Tensor) -> None:
        """Records on the device which parameter is the first whose gradient norm is not finite."""
        bad = ~torch.isfinite(norms)
        # Built once: the copy to a GPU blocks the host.
        if self._indices is None or len(self._indices) != len(norms):
            self._indices = torch.tensor([index for index, _ in self._gradients()], device=norms.device)
        first = self._indices.gather(0, bad.int().argmax(keepdim=True))[0]
        self.last_bad = torch.where(bad.any(), first, self.last_bad)

    def bad(self) -> str | None:
        """Name of the parameter that `note_bad` has recorded last, or None.

        Synchronizes with the device.
        """
        index = int(self.last_bad)
        return None if index < 0 else self.names[index]

    def like(self, index: int, tensor: Tensor) -> Tensor:
        """Wraps an optimizer state tensor of parameter `index` as a DTensor if that is sharded.

        State of another shape than the parameter is returned as it is.
        """
        whole: Any = self.whole[index]
        if not hasattr(whole, "to_local") or tensor.shape != self.parameters[index].shape:
            return tensor
        from torch.distributed.tensor import DTensor

        if tensor.device.type not in (whole.device_mesh.device_type, "meta"):
            # from_local would copy state in host memory to the device, and what is then read into
            # the copy would be lost. FSDP2 makes its own shards in host memory in this way.
            meta = whole._spec.tensor_meta._replace(dtype=tensor.dtype)
            make: Any = DTensor
            return cast(Tensor, make(tensor, dataclasses.replace(whole._spec, tensor_meta=meta), requires_grad=False))
        return DTensor.from_local(
            tensor,
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )

    def _is_sharded(self, index: int) -> bool:
        """Whether this rank holds only a part of parameter `index`."""
        return self.parameters[index] is not self.whole[index]

    def _gradients(self) -> list[tuple[int, Tensor]]:
        return [(i, p.grad) for i, p in enumerate(self.parameters) if p.grad is not None]

    def _shard_group(self) -> dist.ProcessGroup | None:
        """Process group over which parameters are sharded, or None without sharding."""
        first: Any = next((whole for i, whole in enumerate(self.whole) if self._is_sharded(i)), None)
        if first is None:
            return None
        split = [i for i, placement in enumerate(first.placements) if placement.is_shard()]
        return first.device_mesh.get_group(split[0]) if split else None
