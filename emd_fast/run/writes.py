"""What rank 0 writes into a run folder during a run: a failed write stops all ranks together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from emd_fast import distributed
from emd_fast.run.folder import RunError
from emd_fast.run.watch import FolderWatch
from emd_fast.train import run_checkpoints
from emd_fast.train.checkpoint import CheckpointError
from emd_fast.train.trainer import EMDTrainer

FAILED = 1 << 10
"""Tells the other ranks, through a maximum of signal numbers, that a write has failed."""


class RunStopped(RunError):
    """The run folder cannot be written any more. All ranks raise it; rank 0 prints it."""

    exit_code = 1  # the run failed; other errors of a folder are wrong input

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.main = distributed.is_main()


class FolderWrites:
    """Rank 0's writes into the run folder. All ranks create one and make the same calls.

    A rank 0 that failed alone would leave the others in their next collective. So `attempt` keeps
    the error, and all ranks raise it in `check`.

    Args:
        folder: the run folder, opened by `open_folder`.
        held: closes the handles of the folder.
    """

    def __init__(self, folder: Path, held: contextlib.ExitStack) -> None:
        self.failed: Exception | None = None
        self._watches: list[FolderWatch] = []  # of rank 0
        distributed.on_main(lambda: self._watches.append(FolderWatch(folder)))
        for watch in self._watches:
            held.callback(watch.close)

    def watch_also(self, path: Path) -> None:
        """Watches another file in the folder. For rank 0."""
        for watch in self._watches:
            watch.add(path)

    def attempt(self, write: Callable[[], object]) -> None:
        """Calls `write` on rank 0, as long as nothing has failed."""
        if not distributed.is_main() or self.failed is not None:
            return
        try:
            write()
        except (OSError, RuntimeError, ValueError, ModuleNotFoundError) as error:
            self.failed = error

    def look(self) -> None:
        """Checks the folder on rank 0. No rank waits."""
        for watch in self._watches:
            self.attempt(watch.check)

    def check(self) -> None:
        """Checks the folder on rank 0. The other ranks wait.

        Raises:
            RunStopped: on all ranks, if the folder cannot be written or an attempt has failed.
        """
        self.look()
        reason = distributed.on_main(lambda: None if self.failed is None else str(self.failed))
        if reason is not None:
            raise RunStopped(reason)

    def rescue(self, trainer: EMDTrainer, error: CheckpointError | RunStopped) -> NoReturn:
        """Saves a stopped run where its folder is now. All ranks call it.

        Args:
            error: the error that ended the training on all ranks.

        Raises:
            RunStopped: what happened to the folder, and whether the state is saved.
            CheckpointError: `error`, if nothing else is wrong with the folder.
        """
        with contextlib.suppress(CheckpointError):
            trainer.finish_saving()
        try:
            self.check()
        except RunStopped as stopped:
            place = distributed.on_main(self._place)
            said = f"{stopped}; training stopped at step {trainer.steps_done}"
            if place is None:
                raise RunStopped(f"{said}, and its state is lost") from error
            path = run_checkpoints.path_of(place / "checkpoints", trainer.steps_done)
            try:
                trainer.save(path)
            except CheckpointError as second:
                raise RunStopped(f"{said}: {second}") from error
            raise RunStopped(f"{said}, saved as {path}") from error
        raise error

    def _place(self) -> Path | None:
        watch = self._watches[0]
        try:
            place = watch.place()
            if place is not None:
                watch.restore_log(place)
        except (OSError, RunError):  # the save says why
            return watch.folder
        return place
