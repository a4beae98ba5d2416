"""The process group: how it starts and ends, which of its ranks this process is, which samples are its own."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist


class LostRank(RuntimeError):
    """Another rank has ended or cannot be reached, in the middle of what takes both."""


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The process group that torchrun's variables describe, taken down at the end.

    gloo serves CPU tensors, nccl CUDA tensors; each process takes the GPU of its LOCAL_RANK. Outside of torchrun, and
    where there is a process group already, nothing happens.

    Raises:
        LostRank: inside, the connection to another rank was lost. Any other error as it is; its attribute `main` is
        False where the main rank meets the same, and says it.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    store, own, ranks = next(dist.rendezvous("env://"))
    store = _unused(store)
    dist.init_process_group(backend, store=store, rank=own, world_size=ranks)
    try:
        yield
    except Exception as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            reason = re.sub(r"\[\S*/gloo/\S*\] |\. This is typically.*", "", str(error).splitlines()[0])
            raise LostRank(f"rank {own} has lost another rank, which may say why: {reason}") from error
        if not hasattr(error, "main"):  # else it is settled who says it
            vars(error)["main"] = not _left_to_main(store, str(error))
        raise
    finally:
        dist.destroy_process_group()


def _left_to_main(store: dist.Store, message: str) -> bool:
    """Whether this is not the main rank, and that one has the same to say within a moment."""
    said = f"emd_fast {message}"
    try:
        if is_main():
            store.set(said, "")
            # The store may end with this process: not before the others have read it.
            _come(store, [f"{said} {other}" for other in range(1, world_size())])
        elif _come(store, [said]):
            store.set(f"{said} {rank()}", "")
            return True
    except RuntimeError:  # the store has ended
        pass
    return False


def _come(store: dist.Store, keys: list[str]) -> bool:
    """Whether they are there within two seconds; store.wait() would print a warning where they are not."""
    end = time.monotonic() + 2
    while not store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _unused(store: dist.Store) -> dist.Store:
    """The part of torchrun's store that no earlier attempt has written to.

    With --max-restarts and its default rendezvous, torchrun gives all attempts one store, in which gloo finds the
    addresses of ranks that are dead. Other rendezvous give each attempt a store of its own, and their machines need not
    agree on the number of the attempt: hence each looks for what this machine has left there.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    mark = f"emd_fast machine {os.environ.get('GROUP_RANK', 0)} attempt"
    store.set(f"{mark} {attempt}", "begun")
    if any(store.check([f"{mark} {earlier}"]) for earlier in range(attempt)):
        return dist.PrefixStore(f"emd_fast attempt {attempt}", store)
    return store


def rank() -> int:
    """Of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_size() -> int:
    """Processes on this machine, as torchrun says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def barrier() -> None:
    """Waits for all ranks, on the host."""
    if world_size() > 1:
        # Of a CPU tensor: with nccl alongside, dist.barrier would make a GPU wait.
        dist.all_reduce(torch.zeros(1))


def share(samples: int) -> tuple[int, int]:
    """The first sample of this rank and the one after its last, of `samples` in all; shares differ by one at most."""
    return rank() * samples // world_size(), (rank() + 1) * samples // world_size()
