"""Checkpoints: writes and reads folders of tensors and plain values, whole or not at all.

Each rank writes the rows that it holds of the tensors into a file of its own (`checkpoint_format`),
and any number of ranks reads them. A `Writer` writes the checkpoints of a training, in the
background too; `save` writes from one process. `facts` and `restore` read into tensors that are
there; `load` reads everything.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from emd_fast import distributed
from emd_fast.distributed import rows
from emd_fast.distributed.rows import Rows
from emd_fast.io import folders
from emd_fast.io.files import write_atomic
from emd_fast.train import checkpoint_format
from emd_fast.train.checkpoint_format import (
    MANIFEST,
    Chunk,
    Entry,
    FormatError,
    Manifest,
    OtherVersion,
    Written,
    write_rows,
)

_EARLIER = "use an earlier one"
_LATER = "a run in training removes its older ones: use a later one"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or used: one line that names the folder and the remedy."""


class CheckpointNotWritten(CheckpointError):
    """A checkpoint that cannot be written."""

    exit_code = 1  # the machine is at fault; other errors of a checkpoint are wrong input


class CheckpointGone(CheckpointError):
    """A checkpoint that is not there, or that was removed or replaced while it was read."""


# Writing --------------------------------------------------------------------------------------------------------------


def save(path: str | Path, state: Mapping[str, Any]) -> None:
    """Writes a folder from this process alone.

    Args:
        state: {"part": {name: tensor}, ...}, and plain values under other keys, as `load` returns them.

    Raises:
        CheckpointError: it cannot be written; what was at `path` before is intact.
    """
    parts = {part: value for part, value in state.items() if isinstance(value, Mapping) and _are_tensors(value)}
    tensors = {f"{part}.{name}": tensor for part, value in parts.items() for name, tensor in value.items()}
    facts = {name: value for name, value in state.items() if name not in parts}
    _write_folder(Path(path), rows.to_write(tensors, 0, 1), facts, None, None)


def _are_tensors(value: Mapping[str, Any]) -> bool:
    return bool(value) and all(isinstance(item, Tensor) for item in value.values())


class Writer:
    """Writes training checkpoints, one at a time. All ranks make the same calls."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(
        self,
        path: str | Path,
        tensors: dict[str, Tensor],
        facts: Mapping[str, Any],
        *,
        background: bool = False,
        then: Callable[[], object] | None = None,
    ) -> None:
        """Writes a folder under a temporary name, and renames it once all of it is on the disk.

        Args:
            tensors: by "part.name"; the same names in the same order on every rank. Plain tensors are equal on all
                ranks. DTensors are replicated or sharded on dimension 0.
            facts: plain values, the same on every rank.
            background: returns as soon as the tensors are copied to the host's memory; `wait`, or the next `save`,
                waits for the rest and raises what it met.
            then: called on rank 0 after the rename.

        Raises:
            CheckpointError: it cannot be written; what was at `path` before is intact.
        """
        self.wait()
        path = Path(path)
        if self._group is None and distributed.world_size() > 1:
            # A group of its own: from another thread, its collectives would mix with those of the training.
            self._group = dist.new_group(backend="gloo")
        try:
            mine = rows.to_write(tensors, distributed.rank(), distributed.world_size())
        except ValueError as error:
            raise _cannot_write(path, str(error)) from error
        if not background:
            _write_folder(path, mine, facts, self._group, then)
            return
        copied = {name: replace(own, values=own.values.to("cpu", copy=True)) for name, own in mine.items()}

        def work() -> None:
            try:
                _write_folder(path, copied, facts, self._group, then)
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=work, name="emd_fast checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Waits until the last checkpoint is there.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _write_folder(
    path: Path,
    mine: Mapping[str, Rows],
    facts: Mapping[str, Any],
    group: dist.ProcessGroup | None,
    then: Callable[[], object] | None,
) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    rank = 0 if group is None else distributed.rank()

    def prepare() -> None:
        if rank == 0:
            folders.remove(temporary)
            temporary.mkdir(parents=True)

    def finish() -> None:
        if rank == 0:
            manifest = Manifest(dict(facts), tuple(each.file for each in written), _table(mine, written)).encode()
            checkpoint_format.decode(manifest)  # what could not be read is not written
            write_atomic(temporary / MANIFEST, lambda file: file.write(manifest))
            folders.replace(temporary, path)
            if then is not None:
                then()

    try:
        _together(path, prepare, group)
        written: list[Written] = _together(path, lambda: write_rows(temporary, rank, mine), group)
        _together(path, finish, group)
    except CheckpointError:
        if rank == 0:  # half a checkpoint on a disk that may be full serves nobody
            folders.remove(temporary)
        raise


def _table(mine: Mapping[str, Rows], written: Iterable[Written]) -> dict[str, Entry]:
    chunks: dict[str, list[tuple[int, Chunk]]] = {}
    for rank, each in enumerate(written):
        for name, first, begin, count in each.chunks:
            chunks.setdefault(name, []).append((first, Chunk(rank, begin, count)))
    return {
        name: Entry(own.values.dtype, own.shape, tuple(chunk for _, chunk in sorted(chunks.get(name, []))))
        for name, own in mine.items()
    }


def _together(path: Path, work: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank's `work` returned. An error on one is an error on all.

    Raises:
        CheckpointError: the first rank's that failed.
    """
    failure: Exception | None = None
    done: Any = None
    try:
        done = work()
    except Exception as error:
        failure = error
    told = [(done, None if failure is None else _reason(failure))]
    if group is not None:
        told = told * distributed.world_size()
        dist.all_gather_object(told, told[0], group=group)
    for rank, (_, reason) in enumerate(told):
        if reason is not None:
            where = f" (rank {rank})" if len(told) > 1 else ""
            raise _cannot_write(path, f"{reason}{where}") from failure
    return [result for result, _ in told]


# Reading --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Context manager: a CheckpointError of one rank inside the block is raised on all ranks.

    All ranks enter it. A run in training removes old checkpoints and replaces the best one: what
    such a removal makes of the reading is not taken for damage.

    Raises:
        CheckpointGone: the folder was removed or replaced since the block began.
        CheckpointError: that of this rank, or of the first other rank.
    """
    before, failure = _identity(path), None
    try:
        yield
    except CheckpointError as error:
        failure = error
    if before is not None and _identity(path) != before:
        failure = CheckpointGone(f"{path} was removed or replaced while it was read; {_LATER}")
    told = [None if failure is None else (isinstance(failure, CheckpointGone), str(failure))]
    if distributed.world_size() > 1:
        told = told * distributed.world_size()
        dist.all_gather_object(told, told[0])
    errors = [error for error in told if error is not None]
    if any(gone for gone, _ in errors) and not isinstance(failure, CheckpointGone):
        failure = CheckpointGone(next(message for gone, message in errors if gone))
    if failure is not None:
        raise failure
    if errors:
        raise CheckpointError(errors[0][1])


def _identity(path: str | Path) -> tuple[int, ...] | None:
    """Device, number and time of a folder; None if it is not there. Complete checkpoints do not change."""
    try:
        found = folders.standing(path).stat()
    except OSError:
        return None
    # The number of a removed folder may be given to the next one.
    return found.st_dev, found.st_ino, found.st_mtime_ns


def facts(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The facts of a folder. All ranks make the same call.

    Args:
        verify: read every file and compare it with the manifest, each rank its share of them.

    Raises:
        CheckpointError: a missing, half-written, damaged or foreign folder, or one of another release.
    """
    if not verify:
        return _checked_manifest(path, 0, 0).facts
    with reading(path):
        manifest = _checked_manifest(path, distributed.rank(), distributed.world_size())
    return manifest.facts


def _checked_manifest(path: str | Path, first: int, every: int) -> Manifest:
    path = folders.standing(path)
    manifest = _manifest(path)
    if wrong := checkpoint_format.wrong_file(path, manifest, first, every):
        raise _damaged(path, wrong)
    return manifest


def shapes(path: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a folder, by "part.name".

    Raises:
        CheckpointError: a manifest that cannot be read.
    """
    return {name: (entry.shape, entry.dtype) for name, entry in _manifest(folders.standing(path)).tensors.items()}


def restore(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Reads the whole of a folder into `tensors`, in place, on any number of ranks: each reads the rows that it holds.

    Raises:
        CheckpointError: the folder lacks one of these tensors, has one more, or has one in another shape or dtype; it
            is named "part: name", and nothing is written then. A folder that cannot be read.
    """
    path = folders.standing(path)
    manifest = _manifest(path)
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        there = manifest.tensors.get(name)
        if there is None:
            raise CheckpointError(f"{path} does not fit this {part}: it holds no {key}")
        for what, was, now in (("shape", there.shape, tuple(tensor.shape)), ("dtype", there.dtype, tensor.dtype)):
            if was != now:
                raise CheckpointError(f"{path} does not fit this {part}: {key} has {what} {was} there, here {now}")
    for name in manifest.tensors.keys() - tensors.keys():
        part, _, key = name.partition(".")
        raise CheckpointError(f"{path} does not fit: it holds {key} of {part}, for which there is no tensor here")
    _read_into(path, manifest, tensors)


def load(path: str | Path, *, remedy: str = _EARLIER) -> dict[str, Any]:
    """Reads everything in a folder to the CPU, in this process alone, every file verified.

    Args:
        remedy: what the error of a damaged folder advises.

    Returns:
        The facts, and the tensors by part: {"step": ..., "generator": {name: tensor}, ...}.

    Raises:
        CheckpointError: a missing, half-written, damaged or foreign folder, or one of another release.
    """
    path = folders.standing(path)
    manifest = _manifest(path, remedy)
    if wrong := checkpoint_format.wrong_file(path, manifest, 0, 1):
        raise _damaged(path, wrong, remedy)
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in manifest.tensors.items()}
    _read_into(path, manifest, tensors)
    state: dict[str, Any] = dict(manifest.facts)
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        state.setdefault(part, {})[key] = tensor
    return state


def _manifest(path: Path, remedy: str = _EARLIER) -> Manifest:
    if not path.is_dir():
        raise (
            CheckpointError(f"{path} is a file, no folder")
            if path.exists()
            else CheckpointGone(f"no checkpoint at {path}")
        )
    try:
        return checkpoint_format.read(path)
    except OtherVersion as error:
        raise CheckpointError(f"{path} {error}: use the release that wrote it, or train again") from None
    except FormatError as error:
        raise _damaged(path, str(error), remedy) from None


def _read_into(path: Path, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    """Reads the rows that this rank holds of each tensor."""
    try:
        checkpoint_format.read_rows(path, manifest, {name: rows.held(tensor) for name, tensor in tensors.items()})
    except OSError as error:
        raise _damaged(path, _reason(error)) from error


def _cannot_write(path: Path, reason: str) -> CheckpointNotWritten:
    return CheckpointNotWritten(f"cannot write the checkpoint {path}: {reason}; what was there before is intact")


def _damaged(path: Path, what: str, remedy: str = _EARLIER) -> CheckpointError:
    return CheckpointError(f"{path} is truncated, damaged or no checkpoint of emd_fast ({what}); {remedy}")


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
