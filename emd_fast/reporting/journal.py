"""Log of a run: log.jsonl, and TensorBoard and Weights & Biases if they are selected."""

from __future__ import annotations

import importlib
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from emd_fast.io.files import naming, write_text
from emd_fast.io.reading import parse_json, read_bytes, reason
from emd_fast.io.signed import check_text, checked_row, row_of, text_of

_LARGEST = 2**30  # bytes of a log
_WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def read(path: Path, damaged: Callable[[str], object] | None = None) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line that a crash cut off is left out.

    Args:
        damaged: called with one line that names the rows which are damaged. They are left out, like
            all that are no table of numbers with a step.
    """
    rows, wrong = [], []
    try:
        content = read_bytes(path, _LARGEST).decode(errors="replace") if path.exists() else ""
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}; move it away to go on without its rows") from None
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_row(checked_row(line)))
        except ValueError:
            if number < len(lines) or content.endswith("\n"):
                wrong.append(number)
    if wrong and damaged is not None:
        more = f" and {len(wrong) - 1} more lines" if len(wrong) > 1 else ""
        damaged(f"{path} is damaged in line {wrong[0]}{more}: left out")
    return rows


def _row(line: str) -> dict[str, Any]:
    row = parse_json(line)
    match row:
        case {"step": int() as step} if not isinstance(step, bool) and 0 <= step < 2**62:
            if all(value is None or type(value) in (int, float) for value in row.values()):
                return dict(row)
    raise ValueError("a row must be a table of numbers with a step")


def check(sinks: tuple[str, ...]) -> None:
    """Checks that the packages of these sinks are installed, before a run starts.

    Raises:
        ModuleNotFoundError: a package is missing. The message names the extra to install.
    """
    for name in sinks:
        _SINKS[name].module()


class Journal:
    """Appends one row of numbers per logged step.

    Args:
        folder: the run folder.
        step: the step at which the run starts or resumes. Rows of later steps are removed, because
            these steps are made again.
        sinks: any of "tensorboard", "wandb".
        config: the configuration, for Weights & Biases.

    Raises:
        ModuleNotFoundError: a package is missing. The message names the extra to install.
        OSError: a file cannot be written. The message has its path.
        RuntimeError: Weights & Biases cannot be used. The message has the reason.
    """

    def __init__(
        self, folder: Path, step: int, sinks: tuple[str, ...] = (), config: dict[str, Any] | None = None
    ) -> None:
        self.path = folder / "log.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= step]
        write_text(self.path, "".join(map(row_of, kept)))
        # Unbuffered: what a full disk has refused must not be tried again by close().
        self._file = open(self.path, "ab", buffering=0)  # closed by close()
        self._sinks = [_SINKS[name](folder, step, config or {}) for name in sinks]

    def write(self, row: dict[str, float]) -> None:
        """Raises OSError, with the path, where the file cannot be written."""
        left = row_of(row).encode()
        with naming(self.path):
            while left:
                left = left[self._file.write(left) :]
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()


class _TensorBoard:
    def __init__(self, folder: Path, step: int, config: dict[str, Any]) -> None:
        self.path = folder / "tensorboard"
        # Hides the rows that a killed run has logged after the step at which it resumes.
        self._writer = self.module().SummaryWriter(str(self.path), purge_step=step + 1)
        self._excepthook, threading.excepthook = threading.excepthook, self._failed_thread

    def _failed_thread(self, failed: threading.ExceptHookArgs) -> None:
        """Prints no traceback for TensorBoard's writing thread: the next write raises its OSError."""
        own = type(failed.thread).__module__.partition(".")[0] == "tensorboard"
        if not (own and isinstance(failed.exc_value, OSError)):
            self._excepthook(failed)

    @staticmethod
    def module() -> Any:
        return _imported("torch.utils.tensorboard", "TensorBoard")

    def write(self, row: dict[str, float]) -> None:
        with naming(self.path):
            for name, value in row.items():
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        try:
            with naming(self.path):
                self._writer.close()
        finally:
            threading.excepthook = self._excepthook


class _WandB:
    def __init__(self, folder: Path, step: int, config: dict[str, Any]) -> None:
        """Opens or continues the run whose id is in the folder.

        The service ignores rows of steps below its last one, so it keeps the first rows of steps
        that are made again after a crash.
        """
        path, module = folder / "wandb.id", self.module()
        own = _wandb_id(path) if path.exists() else None
        try:
            self._run = module.init(dir=str(folder), config=config, id=own, resume="allow", allow_val_change=True)
        except Exception as error:  # wandb has its own kinds: no key, no project, no network
            raise RuntimeError(f"Weights & Biases cannot be used: {error}") from error
        write_text(path, text_of(f"{self._run.id}\n"))

    @staticmethod
    def module() -> Any:
        return _imported("wandb", "Weights & Biases")

    def write(self, row: dict[str, float]) -> None:
        self._run.log(row, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


def _wandb_id(path: Path) -> str:
    """The id of a run of Weights & Biases that a file holds, with its SHA-256.

    Raises:
        ValueError: a damaged file, or another one.
    """
    try:
        content = read_bytes(path, 300)
        check_text(content)
        own = content.decode().split("\n", 1)[0]
        if not _WANDB_ID.fullmatch(own):
            raise ValueError("it holds no id")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)}): remove it to log to a new run there") from None
    return own


_SINKS: dict[str, type[_TensorBoard | _WandB]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        said = f'{name} is not installed: `pip install "emd_fast[log]"`'
        raise ModuleNotFoundError(said, name=error.name) from None
