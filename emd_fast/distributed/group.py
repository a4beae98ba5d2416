"""The process group: start and end, rank and world size, and the slice of a batch per rank."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist


class LostRank(RuntimeError):
    """The connection to another rank was lost during a collective."""


@contextlib.contextmanager
def process_group(report: Callable[[Exception], object] = lambda error: None) -> Iterator[None]:
    """Context manager: starts the process group that torchrun's environment variables describe.

    The group is destroyed at the end. gloo serves CPU tensors and nccl CUDA tensors. Each process
    uses the GPU of its LOCAL_RANK. Without those variables, or inside an existing process group,
    it does nothing.

    Args:
        report: shows an error that all ranks raise. Rank 0 calls it; the other ranks wait for it,
            since torchrun stops rank 0 as soon as another rank ends.

    Raises:
        LostRank: the connection to another rank was lost inside the block.
        Any other error of the block, unchanged. Its attribute `main` is then set: False on a rank
        whose error rank 0 raises too, with the same message. The command line prints no error
        whose `main` is False.
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
        if not hasattr(error, "main"):  # an error that has it was raised on all ranks together
            vars(error)["main"] = not _main_prints(store, str(error))
        _report_together(error, report, store)
        raise
    finally:
        dist.destroy_process_group()


def _report_together(error: Exception, report: Callable[[Exception], object], store: dist.Store) -> None:
    key = "emd_fast has reported"
    with contextlib.suppress(RuntimeError):  # the process that hosts the store has ended
        if is_main():
            report(error)
            store.set(key, "")
        elif not getattr(error, "main", True):
            _wait_for_keys(store, [key], seconds=60)


def _main_prints(store: dist.Store, message: str) -> bool:
    """Whether this rank is not 0 and rank 0 fails with the same message within two seconds.

    The ranks exchange messages through the store. A collective would hang if one failed alone.
    """
    key = f"emd_fast {message}"
    try:
        if is_main():
            store.set(key, "")
            # This process may host the store, so it waits until the others have read the message.
            _wait_for_keys(store, [f"{key} {other}" for other in range(1, world_size())])
        elif _wait_for_keys(store, [key]):
            store.set(f"{key} {rank()}", "")
            return True
    except RuntimeError:  # the process that hosts the store has ended
        pass
    return False


def _wait_for_keys(store: dist.Store, keys: list[str], seconds: float = 2) -> bool:
    """Whether the store has these keys in time. (store.wait() warns on a timeout.)"""
    end = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _unused(store: dist.Store) -> dist.Store:
    """Returns the store, with a new prefix where an earlier attempt of torchrun has used it.

    With --max-restarts and the default rendezvous, all attempts share one store, in which gloo
    would find the addresses of dead ranks. Other rendezvous backends give each attempt its own
    store, and their machines may count attempts differently. So each machine looks for its own
    earlier marks.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    mark = f"emd_fast machine {os.environ.get('GROUP_RANK', 0)} attempt"
    store.set(f"{mark} {attempt}", "begun")
    if any(store.check([f"{mark} {earlier}"]) for earlier in range(attempt)):
        return dist.PrefixStore(f"emd_fast attempt {attempt}", store)
    return store


def rank() -> int:
    """Rank of this process. 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes in the group. 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_size() -> int:
    """Number of processes on this machine (LOCAL_WORLD_SIZE).

    The world size where that is not set.
    """
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))


def is_main() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


def default_device() -> torch.device:
    """The GPU of this process, or the CPU where there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Blocks the host until every rank has called it."""
    if world_size() > 1:
        # An all-reduce of a CPU tensor: with nccl, dist.barrier() would synchronize a GPU.
        dist.all_reduce(torch.zeros(1))


def share(samples: int) -> tuple[int, int]:
    """This rank's part of `samples` samples, as (first, one after the last).

    Sizes differ by at most 1.
    """
    return rank() * samples // world_size(), (rank() + 1) * samples // world_size()
