"""A cache on the disk of what is computed once for a data set: a classifier, features, metrics."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from emd_fast.train import checkpoint, run_checkpoints
from emd_fast.train.checkpoint import CheckpointError

VARIABLE = "EMD_FAST_CACHE"
"""The environment variable that names the folder of the cache."""
_FORMAT = 1  # raised when what is computed from the same key changes


def folder() -> Path:
    """The folder of the cache: EMD_FAST_CACHE, or emd_fast in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get(VARIABLE)
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emd_fast"


def cached(kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns what `make` returned for this key once, read from the cache.

    Processes that want one entry at a time wait for the first. An entry that is damaged is made
    again. Where the cache cannot be written, nothing is kept.

    Args:
        kind: the first part of the entry's name.
        key: all that the result depends on, as values of JSON.
        make: makes the state, as `checkpoint.save` takes it: tables of tensors, and plain values.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()
    path = folder() / f"{kind}-{digest[:24]}"
    with _alone(path):
        if run_checkpoints.exists(path):
            with contextlib.suppress(CheckpointError):
                return checkpoint.load(path)
        made = make()
        with contextlib.suppress(CheckpointError, OSError):
            checkpoint.save(path, made)
        return made


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes from the entry while the block runs."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    with open(handle, "w") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
