"""The log of a run: log.jsonl always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

from emd_fast.io.files import naming, write_text


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line that a crash cut off is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def check(sinks: tuple[str, ...]) -> None:
    """Whether these sinks are installed, before anything was done for them.

    Raises:
        ModuleNotFoundError: one that is not, with the extra that brings it.
    """
    for name in sinks:
        _SINKS[name].module()


class Journal:
    """Appends a row of numbers for each logged step.

    Args:
        folder: of the run.
        step: where the run goes on; rows of later steps, which a crash has made untrue, are taken out.
        sinks: any of "tensorboard", "wandb".

    Raises:
        ModuleNotFoundError: a sink that is not installed, with the extra that brings it.
        OSError: a file that cannot be written, with its path. RuntimeError: a sink that cannot be used, and why.
    """

    def __init__(
        self, folder: Path, step: int, sinks: tuple[str, ...] = (), config: dict[str, Any] | None = None
    ) -> None:
        self.path = folder / "log.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= step]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        # Unbuffered: what a full disk has refused must not be tried again by close().
        self._file = open(self.path, "ab", buffering=0)  # closed by close()
        self._sinks = [_SINKS[name](folder, step, config or {}) for name in sinks]

    def write(self, row: dict[str, float]) -> None:
        """Raises OSError, with the path, where the file cannot be written."""
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
        # What a killed run has logged beyond the step where it goes on is hidden.
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
        """All legs of a run are one there, known by the id that the folder keeps. Steps that are made again after a
        crash are logged already: the service leaves out a step below the last that it has."""
        path, module = folder / "wandb.id", self.module()
        own = path.read_text().strip() if path.exists() else None
        try:
            self._run = module.init(dir=str(folder), config=config, id=own, resume="allow", allow_val_change=True)
        except Exception as error:  # of its own kinds: no key, no such project, no network
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
