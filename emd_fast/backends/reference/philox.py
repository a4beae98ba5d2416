"""Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors, with the counter of docs/algorithm.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32-bit product, computed in halves since int64 cannot hold it."""
    low = constant * (x & 0xFFFF)
    high = constant * (x >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words in [0, 2^32) per counter. Counter and key are int64 tensors that broadcast."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], x0)
        high1, low1 = _multiply(_MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ k0, low1, high0 ^ x3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def blocks(size: list[int], noise: Tensor, stream: int, substep: int) -> Tensor:
    """Random words (B, blocks, 4) for a tensor of size (B, ...)."""
    seed, step, first_sample, substep_offset = noise.unbind()
    batch, elements = size[0], math.prod(size[1:])
    block = torch.arange((elements + 3) // 4, device=noise.device)[None, :]
    sample = first_sample + torch.arange(batch, device=noise.device)[:, None]
    purpose = stream * 65536 + substep + substep_offset
    words = philox((block, sample, purpose, step), (seed & _MASK, seed >> 32))
    return torch.stack(torch.broadcast_tensors(*words), dim=-1)


def in_size(per_block: Tensor, size: list[int]) -> Tensor:
    """Reshapes numbers per block (B, blocks, 4) to `size`, without the unused ones at the end."""
    return per_block.flatten(1)[:, : math.prod(size[1:])].reshape(size).contiguous()


def to_uniform(words: Tensor) -> Tensor:
    """Converts words to float32 strictly inside (0, 1)."""
    u = words.to(torch.float32) * 2.0**-32 + 2.0**-33
    return u.clamp(max=1 - 2.0**-24)
