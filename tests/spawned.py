"""Processes for the tests: ranks of a gloo group, which do what they are told, and commands of emd-fast."""

import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Forked from a server that has imported PyTorch and emd_fast: an import takes seconds, a fork some milliseconds.
_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "emd_fast.cli.commands", "emd_fast.run.distill"])


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
        folder = tempfile.mkdtemp()
        for rank in range(self.world):
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_rank, args=(rank, self.world, folder, theirs), daemon=True)
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


class Command:
    """`emd-fast WORDS` in a process of its own, as `python -m emd_fast` runs it, with more environment variables."""

    def __init__(self, words: list[str], environment: dict[str, str] | None = None) -> None:
        handle, self._said = tempfile.mkstemp()
        os.close(handle)
        self._process = _CONTEXT.Process(target=_command, args=(words, environment or {}, self._said), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """The exit code, minus the number of a signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"it runs after {timeout} s: {self.said()}"
        return code

    def said(self) -> str:
        """What it has written to stderr."""
        return Path(self._said).read_text()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL; nothing where it has ended."""
        self._process.kill()
        self._process.join()


def _command(words: list[str], environment: dict[str, str], said: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the server had set aside
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stderr, sys.stdout = os.fdopen(2, "w", buffering=1), os.fdopen(1, "w")
    from emd_fast.cli import commands

    sys.exit(commands.main(words))


def ended(processes: list[Command]) -> list[tuple[int, str]]:
    """Exit code and what was said of each, when all have ended; none is left behind."""
    try:
        return [(process.wait(240), process.said()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def wait_for(condition: Callable[[], Any], processes: list[Command], seconds: float = 120) -> None:
    """Until it holds. Raises AssertionError where a process fails before, or it takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or any(process.poll() not in (None, 0) for process in processes):
            raise AssertionError(f"nothing came: {[process.said() for process in processes]}")
        time.sleep(0.01)
