"""Tables of conditions that a trainer draws from, such as encoded prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emd_fast.diffusion.denoiser import Condition
from emd_fast.io.files import write_atomic

_ALONE, _NULL = "cond", "null."


class Table(Protocol):
    """Interface of a table of N conditions. len(table) is N."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> Condition:
        """Returns the conditions (n, ...) at indices (n,) int64 on the CPU."""


class InMemory:
    """Table in memory, from a pytree of tensors (N, ...)."""

    def __init__(self, cond: Condition) -> None:
        sizes = {len(leaf) for leaf in pytree.tree_leaves(cond)}
        if len(sizes) != 1:
            raise ValueError(f"conditions must be a pytree of tensors of one batch size, got sizes {sorted(sizes)}")
        self._cond, self._size = cond, sizes.pop()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, indices: Tensor) -> Condition:
        return pytree.tree_map(lambda leaf: leaf[indices.to(leaf.device)], self._cond)


class Mapped:
    """Table in a safetensors file that `save` wrote. It reads only the rows of an index.

    Raises:
        ValueError: the file cannot be read, or has no table of conditions.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            if not Path(path).is_file():  # a fifo would block
                raise OSError("there is no such file" if not Path(path).exists() else "it is not a regular file")
            self._file: Any = safe_open(str(path), "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the conditions in {path}: {error}") from None
        self._names = [name for name in self._file.keys() if not name.startswith(_NULL)]
        shapes = [self._file.get_slice(name).get_shape() for name in self._names]
        sizes = {shape[0] if shape else -1 for shape in shapes}
        if len(sizes) != 1 or -1 in sizes:
            raise ValueError(f"{path} is no table of conditions: its tensors must have one batch size, got {sizes}")
        self._size = sizes.pop()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, indices: Tensor) -> Condition:
        rows = {name: self._file.get_slice(name) for name in self._names}
        return _unnamed({name: torch.cat([row[i : i + 1] for i in indices.tolist()]) for name, row in rows.items()})

    @property
    def null_cond(self) -> Condition:
        """Unconditional condition (1, ...) for guidance, or None if the file has none."""
        named = {name: _NULL + name for name in self._names}
        stored = set(self._file.keys())
        if not stored.issuperset(named.values()):
            return None
        return _unnamed({name: self._file.get_tensor(null) for name, null in named.items()})


def table(conditions: Any) -> Table:
    """Returns a table of `conditions`: a table, or a tensor, dict, list or tuple of (N, ...)."""
    return InMemory(conditions) if isinstance(conditions, (Tensor, dict, list, tuple)) else conditions


def save(path: str | Path, cond: Condition, null_cond: Condition = None) -> None:
    """Writes a table of conditions to a safetensors file.

    Args:
        path: path of the file.
        cond: a tensor (N, ...) or a dict of such tensors.
        null_cond: the unconditional condition (1, ...) with the structure of cond, or None.

    Raises:
        TypeError: another kind of condition.
    """
    from safetensors.torch import save as encoded

    tensors = _named(cond)
    if null_cond is not None:
        tensors |= {_NULL + name: value for name, value in _named(null_cond).items()}
    whole = encoded({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    write_atomic(Path(path), lambda file: file.write(whole))


def _named(cond: Condition) -> dict[str, Tensor]:
    named = {_ALONE: cond} if isinstance(cond, Tensor) else cond
    if not isinstance(named, Mapping) or not all(isinstance(value, Tensor) for value in named.values()):
        raise TypeError(f"conditions must be a tensor or a dict of tensors, got {type(cond).__name__}")
    return dict(named)


def _unnamed(named: dict[str, Tensor]) -> Condition:
    return named[_ALONE] if list(named) == [_ALONE] else named
