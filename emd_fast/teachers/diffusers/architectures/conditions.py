"""Conditions that networks of diffusers take: none, labels, or tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from emd_fast.cache.conditioning import same
from emd_fast.diffusion.denoiser import Condition
from emd_fast.teachers.labels import check_labels

TOKENS, MASK, POOLED, GUIDANCE = "prompt_embeds", "prompt_mask", "pooled_projections", "guidance"
Rows = dict[str, tuple[int | str, ...]]
LENGTH = "tokens"  # stands for a number that all tensors of a condition share
_KINDS = {TOKENS: "text embeddings", MASK: f"{MASK} bool"}


@dataclass(frozen=True)
class ConditionSpec:
    """What a network takes besides x and the time.

    Args:
        num_classes: labels are int64 (B,) below it; 0 without labels.
        tensors: name -> shape of one row. One tensor is the condition itself, several are a dict.
            `prompt_mask` is bool and tells tokens from padding; the others are floating.
    """

    num_classes: int = 0
    tensors: Mapping[str, tuple[int | str, ...]] = field(default_factory=dict)

    @classmethod
    def text(cls, width: int, others: Rows | None = None, *, masked: bool = False) -> ConditionSpec:
        """Text embeddings (B, tokens, width), with a mask (B, tokens) where `masked`, and other tensors."""
        mask: Rows = {MASK: (LENGTH,)} if masked else {}
        return cls(tensors={TOKENS: (LENGTH, width), **mask, **(others or {})})

    def __str__(self) -> str:
        if self.num_classes:
            return f"labels: an int64 tensor (B,) below {self.num_classes}"
        if not self.tensors:
            return "no condition"
        said = [f"{_KINDS.get(name, name)} {_shape(row)}" for name, row in self.tensors.items()]
        return said[0] if len(said) == 1 else f"a dict of {', '.join(self.tensors)}: {', '.join(said)}"

    def blank(self, tokens: int) -> Condition:
        """The condition of one prompt of that many tokens on the meta device, to count a pass; None without tensors."""
        given = {}
        for name, row in self.tensors.items():
            shape = (1, *(tokens if size == LENGTH else int(size) for size in row))
            value = torch.zeros(shape, dtype=torch.bool if name == MASK else torch.float32, device="meta")
            given[name] = value.as_subclass(_FullMask) if name == MASK else value
        return None if not given else next(iter(given.values())) if len(given) == 1 else given

    def arguments(self, cond: Condition, batch: int) -> dict[str, Tensor] | None:
        """The tensors of a condition by name; None where it is another one."""
        if self.num_classes:
            if not isinstance(cond, Tensor):
                return None
            check_labels(cond, batch, self.num_classes)
            return {"class_labels": cond}
        given = {next(iter(self.tensors), ""): cond} if len(self.tensors) <= 1 else cond
        if not self.tensors:
            return {} if cond is None else None
        if not isinstance(given, Mapping) or given.keys() != self.tensors.keys():
            return None
        lengths: set[int] = set()
        for name, row in self.tensors.items():
            value = given[name]
            if not isinstance(value, Tensor) or value.dim() != 1 + len(row) or len(value) != batch:
                return None
            if value.dtype != torch.bool if name == MASK else not value.is_floating_point():
                return None
            if any(size != wanted for size, wanted in zip(value.shape[1:], row, strict=True) if wanted != LENGTH):
                return None
            lengths |= {size for size, wanted in zip(value.shape[1:], row, strict=True) if wanted == LENGTH}
        return {name: given[name] for name in self.tensors} if len(lengths) < 2 else None


class _FullMask(Tensor):
    """A mask on the meta device of which all tokens count: networks that read their number can be counted."""

    # What is computed from it are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def sum(self, dim: Any, **options: Any) -> Tensor:  # type: ignore[override]
        if options:  # by PyTorch itself
            return self.as_subclass(Tensor).sum(dim, **options)
        return torch.full(self.shape[:1], self.shape[dim], device="cpu")


def told(cond: Condition) -> str:
    """Describes a condition for a message."""
    if isinstance(cond, Tensor):
        return f"a {cond.dtype} tensor {tuple(cond.shape)}".replace("torch.", "")
    if isinstance(cond, Mapping):
        return ", ".join(f"{key}: {told(value)}" for key, value in cond.items())
    return "none" if cond is None else type(cond).__name__


def _shape(row: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, ('B', *row)))}{',' if not row else ''})"


def in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in a dtype, the same tensor in each step of an E-step: the conditioning cache knows it by identity."""
    found: Tensor = same(_in_dtype, value, dtype)
    return found


def _in_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype)


def lengths(mask: Tensor) -> list[int]:
    """Tokens of each prompt. The host waits for them, once in an E-step."""
    found: list[int] = same(_lengths, mask)
    return found


def _lengths(mask: Tensor) -> list[int]:
    counts: list[int] = mask.sum(1).tolist()
    return counts
