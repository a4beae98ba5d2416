"""Which weights a network has, in one line of text."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(network: nn.Module) -> str:
    """The SHA-256 of the names, shapes, dtypes and bytes of a network's parameters and buffers (its state_dict), in
    hexadecimal: the same on every device, and whether or not the network was fused or wrapped by torch.compile.

    Args:
        network: not sharded. Tensors on the meta device count by name, shape and dtype.
    """
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in network.state_dict().items()}
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as threads:  # hashlib lets other threads work meanwhile
        for name, digest in zip(sorted(state), threads.map(_digest, map(state.get, sorted(state))), strict=True):
            whole.update(f"{name} {tuple(state[name].shape)} {state[name].dtype} {digest}\n".encode())
    return whole.hexdigest()


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return ""
    held: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(held).hexdigest()
