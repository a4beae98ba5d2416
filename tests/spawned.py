"""Several processes for the tests of a file, each a rank of a gloo group.

Ranks meet in a file, so that no port is taken twice. They are daemons: they end with the process that asked for them.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


class Ranks:
    """`world` processes that do what they are told, as one group; after an error they are new ones."""

    def __init__(self, world: int) -> None:
        self.world = world
        self._running: list[tuple[Any, Any]] = []

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(*arguments)`, a function of a module, returns on each rank; the first error is raised here."""
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send((work, arguments))
        results, errors = [], []
        for process, pipe in self._running:
            # A rank whose peers fail may wait for ever: the first error ends all.
            while not pipe.poll(0.05 if not errors else 1.0):
                if errors or not process.is_alive():
                    errors.append("ended without a word")
                    break
            else:
                result, error = pipe.recv()
                results.append(result)
                errors += [error] if error else []
        if errors:
            self.close()
            raise AssertionError("\n".join(errors))
        return results

    def _start(self) -> None:
        context = mp.get_context("spawn")
        folder = tempfile.mkdtemp()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(rank, self.world, folder, theirs), daemon=True)
            process.start()
            theirs.close()
            self._running.append((process, ours))

    def close(self) -> None:
        for process, pipe in self._running:
            pipe.close()
            process.terminate()
        for process, _ in self._running:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._running = []


def _rank(rank: int, world: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((work(*arguments), None))
        except BaseException:
            pipe.send((None, f"rank {rank}:\n{traceback.format_exc()}"))
