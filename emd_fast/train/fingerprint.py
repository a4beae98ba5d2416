"""Fingerprint of a network's weights: a SHA-256 hash in hexadecimal."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(network: nn.Module) -> str:
    """SHA-256 of a network's state_dict, in hexadecimal: names, shapes, dtypes and bytes.

    The hash is the same on every device, and the same for a network that was fused or wrapped by
    torch.compile.

    Args:
        network: not sharded. Of tensors on the meta device only name, shape and dtype are hashed.
    """
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in network.state_dict().items()}
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as threads:  # hashlib releases the GIL
        for name, digest in zip(sorted(state), threads.map(_digest, map(state.get, sorted(state))), strict=True):
            whole.update(f"{name} {tuple(state[name].shape)} {state[name].dtype} {digest}\n".encode())
    return whole.hexdigest()


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:
        return ""
    held: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(held).hexdigest()
