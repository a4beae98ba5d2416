"""A stand-in for a GPU: a device whose tensors are held on the CPU, and whose ops refuse tensors of the CPU.

It finds what a GPU would refuse, such as labels that were left on the CPU. It says nothing about kernels,
rounding or time. The device is called "lazy", a type of PyTorch that needs no backend to be named.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from emd_fast.ops import _check
from emd_fast.train import precision

DEVICE = torch.device("lazy")
# A GPU takes indices and sources of copies that are on the CPU.
_MAY_MIX = {"aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class Held(Tensor):
    """A tensor of the device. `held` is its content, a tensor of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Held:
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=DEVICE, strides=held.stride())
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Held({self.held!r})"


class _Device(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an op on what tensors hold. The result is on the device if an argument or `device` is.

    Raises:
        AssertionError: tensors of the device and of the CPU together; those of one number may.
    """
    leaves, form = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Held)]
    others = [tensor for tensor in tensors if not isinstance(tensor, Held)]
    name, to = op._schema.name, kwargs.get("device")
    mixed = ours and any(tensor.dim() for tensor in others)
    indexed = name.startswith("aten::index") and not isinstance(args[0], Held)
    assert not mixed or (name in _MAY_MIX and not indexed), f"{name} of tensors on two devices: {tensors}"
    args, kwargs = pytree.tree_unflatten([x.held if isinstance(x, Held) else x for x in leaves], form)
    if to is not None:
        kwargs["device"] = "cpu"
    result = op(*args, **kwargs)
    stays = isinstance(tensors[0], Held) if name == "aten::copy_" else bool(ours)
    if not (stays if to is None else torch.device(to) == DEVICE):
        return result
    known = {id(tensor.held): tensor for tensor in ours}  # of an op in place
    return pytree.tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else Held(x), result)


def _from_the_cpu(make: Any) -> Any:
    """torch.tensor and torch.as_tensor fill a tensor of the device without an op, which has no content to fill."""

    @functools.wraps(make)
    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        there = device is not None and torch.device(device) == DEVICE
        found = make(*args, device=None if there else device, **kwargs)
        return found.to(DEVICE) if there else found

    return made


class _AdamW(torch.optim.AdamW):
    def __init__(self, *args: Any, fused: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


@contextlib.contextmanager
def second_device(monkeypatch: Any):
    """Context manager: `DEVICE` computes inside the block."""
    with monkeypatch.context() as patch, _Device():
        patch.setattr(torch, "tensor", _from_the_cpu(torch.tensor))
        patch.setattr(torch, "as_tensor", _from_the_cpu(torch.as_tensor))
        # Autocast, the fused optimizer and pointers are those of real devices.
        patch.setattr(torch.optim, "AdamW", _AdamW)
        patch.setattr(precision, "autocast", lambda dtype, device: contextlib.nullcontext())
        patch.setattr(_check, "written_apart", lambda *given: None)
        yield
