"""Tables of conditions that a trainer draws from, such as encoded prompts."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from emd_fast.diffusion import ragged
from emd_fast.diffusion.denoiser import Condition
from emd_fast.io.files import write_atomic
from emd_fast.io.reading import reason

_ALONE, _NULL = "cond", "null."
_MOST_TENSORS = 64
_CHUNK = 2**22  # values that are checked at once
_Form = tuple[str, tuple[int, ...]]  # dtype, shape
_CODES = {  # as safetensors names them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Table(Protocol):
    """Interface of a table of N conditions. len(table) is N."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor) -> Condition:
        """Returns the conditions (n, ...) at indices (n,) int64 on the CPU.

        Padding that none of them needs, by their mask, is cut.
        """


class InMemory:
    """Table in memory, from a pytree of tensors (N, ...).

    Raises:
        ValueError: several batch sizes, no condition, or NaN or infinite values.
    """

    def __init__(self, cond: Condition) -> None:
        leaves = {f"leaf {i}": leaf for i, leaf in enumerate(pytree.tree_leaves(cond))}
        self._size = _rows_of({name: list(leaf.shape) for name, leaf in leaves.items()})
        for name, leaf in leaves.items():
            _check_rows(name, leaf, list(leaf.shape))
        self._cond = cond

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, indices: Tensor) -> Condition:
        return ragged.trimmed(pytree.tree_map(lambda leaf: leaf[indices.to(leaf.device)], self._cond))


class Mapped:
    """Table in a safetensors file that `save` wrote. It reads only the rows of an index.

    Args:
        path: the file.
        finite: whether its values are known to be finite. Otherwise all of it is read once, some rows at a time.

    Raises:
        ValueError: the file cannot be read, has no table of conditions, a null condition of another shape or dtype
            than the rows, or NaN or infinite values.
    """

    def __init__(self, path: str | Path, *, finite: bool = False) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            if not Path(path).is_file():  # a fifo would block
                raise OSError("there is no such file" if not Path(path).exists() else "it is not a regular file")
            self._file: Any = safe_open(str(path), "pt")
            stored = {name: self._file.get_slice(name) for name in self._file.keys()}
            forms = {name: (row.get_dtype(), tuple(row.get_shape())) for name, row in stored.items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"cannot read the conditions in {path}: {reason(error)}") from None
        self._names = [name for name in stored if not name.startswith(_NULL)]
        self._nulls = {name: _NULL + name for name in self._names} if len(stored) > len(self._names) else {}
        try:
            self._size = _rows_of({name: list(forms[name][1]) for name in self._names})
            for name, (dtype, _) in forms.items():
                if dtype not in _CODES.values():
                    raise ValueError(f"{_short(name)} is of {_short(dtype)}: convert it to float32 or int64")
            rows, nulls = (
                {n: form for n, form in forms.items() if n.startswith(_NULL) == null} for null in (False, True)
            )
            if nulls and (wrong := _null_differs(rows, nulls)):
                raise ValueError(wrong)
            if not finite:
                for name, (_, shape) in forms.items():
                    _check_rows(name, stored[name], list(shape))
        except ValueError as error:
            raise ValueError(f"{path} is no table of conditions: {error}") from None

        masks = [name for name in self._names if forms[name][0] == "BOOL" and len(forms[name][1]) == 2]
        self._mask = masks[0] if masks else None

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, indices: Tensor) -> Condition:
        rows, cut, which = {name: self._file.get_slice(name) for name in self._names}, {}, indices.tolist()
        if self._mask is not None:
            # Tokens that no prompt of the batch has are not read.
            mask = torch.cat([rows[self._mask][i : i + 1] for i in which])
            length = ragged.kept(mask)
            shapes = {name: row.get_shape() for name, row in rows.items()}
            whole = [name for name, shape in shapes.items() if len(shape) > 2 or name == self._mask]
            cut = {name: length for name in whole if shapes[name][1] == mask.shape[1]}

        def read(name: str, i: int) -> Tensor:
            found: Tensor = rows[name][i : i + 1, : cut[name]] if name in cut else rows[name][i : i + 1]
            return found

        return _unnamed({name: torch.cat([read(name, i) for i in which]) for name in rows})

    @property
    def null_cond(self) -> Condition:
        """Unconditional condition (1, ...) for guidance, or None if the file has none."""
        if not self._nulls:
            return None
        return ragged.trimmed(_unnamed({name: self._file.get_tensor(null) for name, null in self._nulls.items()}))

    def extremes(self) -> Tensor:
        """Indices of rows that a network takes if it takes all: the first, the least and the largest labels."""
        found = {0}
        for name in self._names:
            if len(self._file.get_slice(name).get_shape()) == 1:  # labels: a few bytes each
                labels = self._file.get_tensor(name)
                found |= {int(labels.argmin()), int(labels.argmax())}
        return torch.tensor(sorted(found))


def _rows_of(shapes: Mapping[str, list[int]]) -> int:
    """N of tensors (N, ...).

    Raises:
        ValueError: no tensor, too many, several N, or one without rows or values.
    """
    if not 1 <= len(shapes) <= _MOST_TENSORS:
        raise ValueError(f"it has {len(shapes)} tensors of conditions, 1 to {_MOST_TENSORS} are wanted")
    for name, shape in shapes.items():
        if not shape or 0 in shape:
            raise ValueError(f"{_short(name)} has shape {tuple(shape)}, a row for each condition is wanted")
    sizes = sorted({shape[0] for shape in shapes.values()})
    if len(sizes) != 1:
        raise ValueError(f"conditions must be tensors of one batch size, got sizes {_short(sizes)}")
    return sizes[0]


def _check_rows(name: str, rows: Any, shape: list[int]) -> None:
    """Whether all values of a tensor or a slice of a file are finite; reads some rows at a time."""
    step = max(1, _CHUNK // math.prod(shape[1:]))
    for first in range(0, shape[0], step):
        part: Tensor = rows[first : first + step]
        if not part.is_floating_point():
            return
        finite = part.isfinite().reshape(len(part), -1).all(1)
        if not finite.all():
            row = first + int(finite.logical_not().nonzero()[0])
            raise ValueError(f"row {row} of {_short(name)} holds NaN or infinite values: remove it, or encode it again")


def _short(value: object) -> str:
    return repr(value)[:100]


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
        ValueError: several batch sizes, or a null condition of another structure.
    """
    size = _rows_of({name: list(value.shape) for name, value in _named(cond).items()})
    write_atomic(Path(path), lambda file: Writer(file, size, cond, null_cond).write(0, cond))


class Writer:
    """Writes a table of conditions into a safetensors file, some rows at a time, in any order.

    Args:
        file: an unbuffered or new file that can be read and written at any position. What it holds beyond the header
            and the null condition stays.
        size: number of conditions, N.
        like: a condition (1, ...) or more of them, which says shapes and dtypes.
        null_cond: as for `save`.

    Raises:
        TypeError: another kind of condition, or a dtype that is not stored.
        ValueError: a null condition of another structure.
    """

    def __init__(self, file: BinaryIO, size: int, like: Condition, null_cond: Condition = None) -> None:
        rows = _named(like)
        nulls = {} if null_cond is None else {_NULL + name: value for name, value in _named(null_cond).items()}
        if nulls and (wrong := _null_differs(_forms(rows), _forms(nulls))):
            raise ValueError(wrong)
        self._file, self._rows = file, {name: value[:1] for name, value in rows.items()}
        self._offsets: dict[str, int] = {}
        header, end = {}, 0
        whole = rows | nulls
        # Larger items first, so that all are aligned.
        for name in sorted(whole, key=lambda name: (-whole[name].element_size(), name)):
            value = whole[name]
            if value.dtype not in _CODES:
                raise TypeError(f"conditions of {value.dtype} are not stored: convert them to float32 or int64")
            shape = [size if name in rows else len(value), *value.shape[1:]]
            self._offsets[name], begin = end, end
            end += math.prod(shape) * value.element_size()
            header[name] = {"dtype": _CODES[value.dtype], "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._offsets = {name: start + offset for name, offset in self._offsets.items()}
        file.seek(0)
        _write(file, len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)
        for name, value in nulls.items():
            file.seek(self._offsets[name])
            _write(file, _bytes(value))

    def write(self, first: int, cond: Condition) -> int:
        """Writes the conditions (n, ...) of the rows from `first` on, and returns their CRC-32.

        Raises:
            ValueError: rows of another shape or dtype.
        """
        values, crc = _named(cond), 0
        if (forms := _forms(values)) != (wanted := _forms(self._rows, len(next(iter(values.values()))))):
            raise ValueError(f"conditions must be {_told(wanted)} as the others, got {_told(forms)}")
        for name, row in self._rows.items():
            content = _bytes(values[name])
            self._file.seek(self._offsets[name] + first * row.nbytes)
            _write(self._file, content)
            crc = zlib.crc32(content, crc)
        return crc

    def crc(self, first: int, n: int) -> int:
        """The CRC-32 of the n rows from `first` on, as they are in the file."""
        crc = 0
        for name, row in self._rows.items():
            self._file.seek(self._offsets[name] + first * row.nbytes)
            crc = zlib.crc32(self._file.read(n * row.nbytes), crc)
        return crc


def check_finite(cond: Condition, said: str) -> None:
    """Whether all floating numbers of a condition are finite.

    Raises:
        ValueError: some are not. The message is `said`.
    """
    for leaf in pytree.tree_leaves(cond):
        if leaf.is_floating_point() and not leaf.float().isfinite().all():
            raise ValueError(said)


def _forms(named: Mapping[str, Tensor], size: int | None = None) -> dict[str, _Form]:
    """dtype and shape of each; with `size` rows."""
    return {
        name: (str(value.dtype).removeprefix("torch."), (len(value) if size is None else size, *value.shape[1:]))
        for name, value in named.items()
    }


def _null_differs(rows: Mapping[str, _Form], nulls: Mapping[str, _Form]) -> str | None:
    """Why a null condition does not fit the rows of a table, or None."""
    wanted = {_NULL + name: (dtype, (1, *shape[1:])) for name, (dtype, shape) in rows.items()}
    if wanted == nulls:
        return None
    return f"the null condition must be {_told(wanted)} as a row is, got {_told(nulls)}: encode it as the rows are"


def _told(forms: Mapping[str, _Form]) -> str:
    return ", ".join(f"{_short(name)} {dtype} {shape}" for name, (dtype, shape) in sorted(forms.items()))[:300]


def _bytes(value: Tensor) -> memoryview:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _write(file: BinaryIO, content: bytes | memoryview) -> None:
    left = memoryview(content)
    while left:  # an unbuffered file may take a part
        left = left[file.write(left) :]


def _named(cond: Condition) -> dict[str, Tensor]:
    named = {_ALONE: cond} if isinstance(cond, Tensor) else cond
    if not isinstance(named, Mapping) or not all(isinstance(value, Tensor) for value in named.values()):
        raise TypeError(f"conditions must be a tensor or a dict of tensors, got {type(cond).__name__}")
    return dict(named)


def _unnamed(named: dict[str, Tensor]) -> Condition:
    return named[_ALONE] if list(named) == [_ALONE] else named
