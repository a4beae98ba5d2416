"""Log of a run: log.jsonl, and TensorBoard and Weights & Biases if they are selected."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

from emd_fast.io.files import naming, write_text


def read(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a log.jsonl. Lines that a crash left incomplete are skipped.

    A missing file has no rows.
    """
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


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
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        # Unbuffered, so that close() does not repeat a write that failed on a full disk.
        self._file = open(self.path, "ab", buffering=0)  # closed by close()
        self._sinks = [_SINKS[name](folder, step, config or {}) for name in sinks]

    def write(self, row: dict[str, float]) -> None:
        """Writes one row. `row` has the key "step".

        Raises:
            OSError: the file cannot be written. The message has its path.
        """
        left = (json.dumps(row) + "\n").encode()
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

    @staticmethod
    def module() -> Any:
        return _imported("torch.utils.tensorboard", "TensorBoard")

    def write(self, row: dict[str, float]) -> None:
        with naming(self.path):
            for name, value in row.items():
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        with naming(self.path):
            self._writer.close()


class _WandB:
    def __init__(self, folder: Path, step: int, config: dict[str, Any]) -> None:
        """Opens or continues the run whose id is in the folder.

        The service ignores rows of steps below its last one, so it keeps the first rows of steps
        that are made again after a crash.
        """
        path, module = folder / "wandb.id", self.module()
        own = path.read_text().strip() if path.exists() else None
        try:
            self._run = module.init(dir=str(folder), config=config, id=own, resume="allow", allow_val_change=True)
        except Exception as error:  # wandb has its own kinds: no key, no project, no network
            raise RuntimeError(f"Weights & Biases cannot be used: {error}") from error
        write_text(path, self._run.id)

    @staticmethod
    def module() -> Any:
        return _imported("wandb", "Weights & Biases")

    def write(self, row: dict[str, float]) -> None:
        self._run.log(row, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, type[_TensorBoard | _WandB]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _imported(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        said = f'{name} is not installed: `pip install "emd_fast[log]"`'
        raise ModuleNotFoundError(said, name=error.name) from None
