"""Checkpoints, which are there whole or not at all.

A file holds one state of tensors and plain values (a teacher): `save`, `load`. A training checkpoint is a folder that
torch.distributed.checkpoint has written, each rank its part, with a manifest of what is in it: `Writer`, `facts`,
`restore`; `load` reads it too, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import threading
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from emd_fast import distributed
from emd_fast.io.files import write_text, write_whole

_FORMAT = "emd_fast checkpoint"
_VERSION = 2
_NAME = re.compile(r"step-(\d{8})")
_MANIFEST = "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read: one line that names the file and the remedy."""


# Files ----------------------------------------------------------------------------------------------------------------


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Writes a state of tensors and plain values into one file.

    Raises:
        CheckpointError: it cannot be written; what stood at `path` before is intact.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: torch.save({"format": _FORMAT, "version": _VERSION, **state}, file))
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise _cannot_write(path, error) from error


def load(path: str | Path) -> dict[str, Any]:
    """Reads what `save` or a `Writer` wrote, to the CPU, in this process alone.

    A folder gives its facts and, by part, its tensors: {"step": ..., "generator": {name: tensor}, ...}.

    Raises:
        CheckpointError: a missing, truncated or foreign file.
    """
    path = _standing(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as error:
        raise _damaged(path, type(error).__name__) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of emd_fast")
    _check_version(path, state)
    return state


# Folders: writing -----------------------------------------------------------------------------------------------------


class Writer:
    """Writes training checkpoints, one at a time; all ranks call it alike."""

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
            tensors: by "part.name"; DTensors are written by the ranks that hold them.
            facts: plain values, the same on every rank.
            background: returns as soon as the tensors are copied to the host's memory; `wait`, or the next `save`,
                waits for the rest and raises what it met.
            then: called on rank 0 after the rename.

        Raises:
            CheckpointError: it cannot be written; what stood at `path` before is intact.
        """
        self.wait()
        path = Path(path)
        if self._group is None and distributed.world_size() > 1:
            # A group of its own: from another thread, its collectives would mix with those of the training.
            self._group = dist.new_group(backend="gloo")
        if not background:
            _write_folder(path, tensors, facts, self._group, then)
            return
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        copied = BlockingAsyncStager().stage(tensors)

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
    tensors: dict[str, Tensor],
    facts: Mapping[str, Any],
    group: dist.ProcessGroup | None,
    then: Callable[[], object] | None,
) -> None:
    dcp = _dcp()
    temporary = path.with_name(f".{path.name}.tmp")
    main = distributed.is_main()

    def prepare() -> None:
        if main:
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)

    def write() -> dict[str, list[Any]]:
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary), process_group=group, no_dist=group is None)
        mine = [*temporary.glob(f"__{distributed.rank()}_*"), *([temporary / ".metadata"] if main else [])]
        return {file.name: [file.stat().st_size, _digest(file)] for file in mine}

    def finish() -> None:
        if main:
            manifest: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "facts": dict(facts), "files": files}
            manifest["sha256"] = _own_digest(manifest)
            write_text(temporary / _MANIFEST, json.dumps(manifest, indent=1))
            _sync(temporary)
            _put_in_place(temporary, path)
            if then is not None:
                then()

    try:
        _together(path, prepare, group)
        files = {name: entry for part in _together(path, write, group) for name, entry in part.items()}
        _together(path, finish, group)
    except CheckpointError:
        if main:  # half a checkpoint on a disk that may be full serves nobody
            _remove(temporary)
        raise


def _together(path: Path, work: Callable[[], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """What every rank's `work` returned; an error on one is an error on all.

    Raises:
        CheckpointError: the first rank's that failed.
    """
    failure: BaseException | None = None
    done: Any = None
    try:
        done = work()
    except BaseException as error:
        failure = _cause(error)
    told = [(done, None if failure is None else _reason(failure))]
    if group is not None:
        told = told * distributed.world_size()
        dist.all_gather_object(told, told[0], group=group)
    for rank, (_, reason) in enumerate(told):
        if reason is not None:
            where = f" (rank {rank})" if len(told) > 1 else ""
            raise CheckpointError(
                f"cannot write the checkpoint {path}: {reason}{where}; what was there before is intact"
            ) from failure
    return [result for result, _ in told]


def _put_in_place(temporary: Path, path: Path) -> None:
    """One rename where nothing stands at `path`; else what stands there is moved aside first, and `load` finds it
    should the process die in between."""
    aside = _aside(path)
    if path.exists():
        _remove(aside)
        os.rename(path, aside)
    os.rename(temporary, path)
    _sync(path.parent)
    _remove(aside)


def _standing(path: str | Path) -> Path:
    """Where the checkpoint is: what was moved aside, should nothing have come in its place."""
    path = Path(path)
    return _aside(path) if not path.exists() and _aside(path).exists() else path


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_digest(manifest: Mapping[str, Any]) -> str:
    """Of what a manifest says; a byte of it that has turned may give another number that reads as well."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


# Folders: reading -----------------------------------------------------------------------------------------------------


def facts(path: str | Path, *, verify: bool = True) -> dict[str, Any]:
    """The facts of a folder; all ranks call it alike.

    Args:
        verify: read every file and compare it with the manifest, each rank its share of them.

    Raises:
        CheckpointError: a missing, half-written, damaged or foreign folder.
    """
    path = _standing(path)
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file, no folder" if path.exists() else f"no checkpoint at {path}")
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{_MANIFEST}: {type(error).__name__}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of emd_fast")
    _check_version(path, manifest)
    if manifest.pop("sha256", None) != _own_digest(manifest):
        raise _damaged(path, _MANIFEST)
    wrong = _wrong_files(
        path, manifest["files"], *((distributed.rank(), distributed.world_size()) if verify else (0, 0))
    )
    if verify and distributed.world_size() > 1:
        told: list[Any] = [None] * distributed.world_size()
        dist.all_gather_object(told, wrong)
        wrong = next((name for name in told if name), None)
    if wrong:
        raise _damaged(path, wrong)
    return manifest["facts"]


def _wrong_files(path: Path, files: dict[str, list[Any]], first: int, every: int) -> str | None:
    """The first file that is not what the manifest says: its size, and of every so-many-th its contents."""
    for index, (name, (size, digest)) in enumerate(sorted(files.items())):
        file = path / name
        try:
            if file.stat().st_size != size or (every and index % every == first and _digest(file) != digest):
                return name
        except OSError:
            return name
    return None


def shapes(path: str | Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor in a folder, by "part.name".

    Raises:
        CheckpointError: metadata that cannot be read.
    """
    return {name: (tuple(entry.size), entry.properties.dtype) for name, entry in _metadata(_standing(path)).items()}


def restore(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Reads a folder into `tensors`, in place, on however many ranks: each reads what it holds.

    Raises:
        CheckpointError: a tensor that the folder has not, or has in another shape, named "part: name"; nothing is
            written then. A folder that cannot be read.
    """
    _read_into(_standing(path), tensors, alone=False)


def _read_into(path: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    there = shapes(path)
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        if name not in there:
            raise CheckpointError(f"{path} does not fit this {part}: it holds no {key}")
        if there[name][0] != tuple(tensor.shape):
            raise CheckpointError(
                f"{path} does not fit this {part}: {key} has shape {there[name][0]} there, here {tuple(tensor.shape)}"
            )
    try:
        _dcp().load(tensors, storage_reader=_reader(path), no_dist=alone or distributed.world_size() == 1)
    except BaseException as error:
        cause = _cause(error)
        raise _damaged(path, _reason(cause)) from cause


def _load_folder(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = dict(_alone(path))
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes(path).items()}
    _read_into(path, tensors, alone=True)
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        state.setdefault(part, {})[key] = tensor
    return state


def _alone(path: Path) -> dict[str, Any]:
    """The facts, every file verified by this process."""
    held = facts(path, verify=False)
    manifest = json.loads((path / _MANIFEST).read_text())
    if wrong := _wrong_files(path, manifest["files"], 0, 1):
        raise _damaged(path, wrong)
    return held


def _metadata(path: Path) -> dict[str, Any]:
    try:
        return _reader(path).read_metadata().state_dict_metadata
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ValueError, KeyError, IndexError) as error:
        raise _damaged(path, f".metadata: {_reason(error)}") from error


def _dcp() -> Any:
    from torch.distributed import checkpoint as dcp

    # It warns at every call in a single process that this is a single process.
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)
    return dcp


class _Unpickler(pickle.Unpickler):
    """torch keeps a checkpoint's table of contents as a pickle; this one builds what belongs there and nothing else."""

    _PLAIN = ("torch.distributed.checkpoint.metadata", "pathlib", "pathlib._local")
    _ALLOWED: ClassVar = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch._utils", "_rebuild_device"),
        ("collections", "OrderedDict"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) in self._ALLOWED or (module in self._PLAIN and "." not in name):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no business there")


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(path / ".metadata", "rb") as file:
                metadata = _Unpickler(file).load()
            if getattr(metadata, "storage_meta", None) is None:
                metadata.storage_meta = StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)


# The checkpoints of a run ---------------------------------------------------------------------------------------------


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint that `found` found."""
    return int(path.name.removeprefix("step-"))


def best_of(folder: Path) -> Path:
    """Where the best checkpoint stands; `found` and `keep_last` do not see it."""
    return folder / "best"


def exists(path: str | Path) -> bool:
    return _standing(path).exists()


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by rising step."""
    return sorted(entry for entry in folder.glob("step-*") if _NAME.fullmatch(entry.name))


def keep_last(folder: Path, count: int, step: int) -> None:
    """Removes all but the last few of those of at most `step` steps. Later ones could not be read, or the run would
    have gone on from there: they do not count, and stay until the run comes by again."""
    for old in [path for path in found(folder) if step_of(path) <= step][:-count]:
        # Out of sight first: half of a folder must not pass for a checkpoint.
        hidden = old.with_name(f".{old.name}.tmp")
        _remove(hidden)
        os.rename(old, hidden)
        _remove(hidden)


def clear_unfinished(folder: Path) -> None:
    """Removes what a process that was killed left half-written."""
    for pattern in (".step-*.tmp", ".best.tmp"):
        for entry in folder.glob(pattern):
            _remove(entry)


def _check_version(path: Path, state: Mapping[str, Any]) -> None:
    if state.get("version") != _VERSION:
        raise CheckpointError(f"{path} has format version {state.get('version')}, this release reads {_VERSION}")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated, damaged or no checkpoint of emd_fast ({what}); use an earlier one")


def _cannot_write(path: Path, error: BaseException) -> CheckpointError:
    return CheckpointError(f"cannot write the checkpoint {path}: {_reason(error)}; what was there before is intact")


def _cause(error: BaseException) -> BaseException:
    """torch gathers the errors of all ranks into one, no Exception, that hides what the system said. What is neither
    that nor an Exception goes on its way."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    if not isinstance(error, Exception):
        raise error
    return error


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
