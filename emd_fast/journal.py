"""The log of a run: log.jsonl always, TensorBoard and Weights & Biases when asked."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from emd_fast.checkpoint import write_whole


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl; a last line that a crash cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class Journal:
    """Appends a row of numbers for each logged step.

    Args:
        folder: of the run.
        step: where the run goes on; rows of later steps, which a crash has made untrue, are taken out.
        sinks: any of "tensorboard", "wandb".

    Raises:
        ModuleNotFoundError: a sink that is not installed, with the extra that brings it.
    """

    def __init__(
        self, folder: Path, step: int, sinks: tuple[str, ...] = (), config: dict[str, Any] | None = None
    ) -> None:
        self.path = folder / "log.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= step]
        write_whole(self.path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in kept).encode()))
        self._file = open(self.path, "a", buffering=1)  # closed by close()
        self._sinks = [_SINKS[name](folder, config or {}) for name in sinks]

    def write(self, row: dict[str, float]) -> None:
        self._file.write(json.dumps(row) + "\n")
        for sink in self._sinks:
            sink.write(row)

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()


class _TensorBoard:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise _missing("TensorBoard", error) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise _missing("Weights & Biases", error) from None
        self._run = wandb.init(dir=str(folder), config=config)

    def write(self, row: dict[str, float]) -> None:
        self._run.log(row, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


_SINKS: dict[str, type[_TensorBoard | _WandB]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _missing(name: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    return ModuleNotFoundError(f'{name} is not installed: `pip install "emd_fast[log]"`', name=error.name)
