"""Checks that a run folder is still the one that the run opened, and that it can be written."""

from __future__ import annotations

import os
from pathlib import Path

from emd_fast.io.files import write_atomic
from emd_fast.run.folder import RunError

_FOLDERS = ("checkpoints", "samples")


class FolderWatch:
    """Notices that a run folder is renamed, removed, replaced or no longer writable.

    Rank 0 creates one when the run opens the folder. The open handles keep the system from giving
    the number of a removed file or folder to a new one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._handles: dict[Path, int] = {}
        for path in (folder, *(folder / name for name in _FOLDERS)):
            self.add(path)

    def add(self, path: Path) -> None:
        """Watches another file or folder in the run folder."""
        self._handles[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def check(self) -> None:
        """Checks the folder, by a few system calls.

        Raises:
            RunError: the run cannot go on writing into the folder. The message says what happened.
        """
        folder = self.folder
        if not self._is_same(folder, folder):
            where = self.place()
            fate = "removed" if where is None else f"renamed to {where}"
            other = ", and another one has its name now" if folder.exists() else ""
            remedy = "" if where is None else f" (--out {where} goes on there)"
            raise RunError(f"the run folder {folder} was {fate} during the run{other}{remedy}")
        for path in (folder / "config.toml", *self._handles):
            if not path.exists():
                raise RunError(f"{path} was removed during the run")
            if path in self._handles and not self._is_same(path, path):
                raise RunError(f"{path} was replaced during the run")
        for path in (folder, *(folder / name for name in _FOLDERS)):
            if not os.access(path, os.W_OK | os.X_OK):
                read_only = os.statvfs(path).f_flag & os.ST_RDONLY
                why = "its file system is read-only now" if read_only else "its permissions were changed"
                raise RunError(f"{path} cannot be written any more: {why}")

    def place(self) -> Path | None:
        """Where the folder is now. None: it was removed, or the system does not tell."""
        if self._is_same(self.folder, self.folder):
            return self.folder
        try:
            path = Path(os.readlink(f"/proc/self/fd/{self._handles[self.folder]}"))
        except OSError:  # not Linux
            return None
        return path if self._is_same(path, self.folder) else None

    def restore_log(self, place: Path) -> None:
        """Writes the rows of a log.jsonl that was removed, from its open handle, into `place`."""
        handle = self._handles.get(self.folder / "log.jsonl")
        if handle is not None and not (place / "log.jsonl").exists():
            rows = os.pread(handle, os.fstat(handle).st_size, 0)
            write_atomic(place / "log.jsonl", lambda file: file.write(rows))

    def _is_same(self, path: Path, watched: Path) -> bool:
        """Whether `path` leads to what was opened as `watched`.

        Raises:
            RunError: a folder above it cannot be searched any more.
        """
        try:
            return os.path.samestat(path.stat(), os.fstat(self._handles[watched]))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise RunError(f"{path} cannot be reached any more: {error.strerror}") from None
