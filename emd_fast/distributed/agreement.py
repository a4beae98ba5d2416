"""Collectives on plain Python values: results, errors, equality checks and a maximum."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from emd_fast.distributed import group

T = TypeVar("T")


class GroupError(ValueError):
    """An error that every rank raises with the same message.

    Only rank 0 prints it (`main` is True there).
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.main = group.is_main()


class FailedOnMain(RuntimeError):
    """Raised on the other ranks for an error that rank 0 met in `on_main`.

    Rank 0 prints its own error.
    """

    main = False


def on_main(work: Callable[[], T]) -> T:
    """Calls `work` on rank 0 only and returns its result on every rank. The other ranks wait.

    Raises:
        FailedOnMain: on the other ranks, with the message of the error on rank 0.
        Any error of `work`: on rank 0, unchanged.
    """
    if group.world_size() == 1:
        return work()
    outcome: list[Any] = [None, None]  # the result, the error's message
    failure: BaseException | None = None
    if group.is_main():
        try:
            outcome[0] = work()
        except BaseException as error:
            failure, outcome[1] = error, f"{type(error).__name__} on rank 0: {error}"
            vars(error)["main"] = True  # the other ranks receive it here: rank 0 prints it
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise FailedOnMain(outcome[1])
    return outcome[0]


def raise_together(error: ValueError | None) -> None:
    """Raises the error of any rank on every rank. All ranks must call it, also without an error.

    A rank that raised alone would leave the others waiting in their next collective.

    Raises:
        ValueError: the error of this rank, or that of the first other rank, with its number.
    """
    reasons: list[str | None] = [None] * group.world_size()
    if group.world_size() > 1:
        dist.all_gather_object(reasons, None if error is None else str(error))
    if error is not None:
        raise error
    for other, reason in enumerate(reasons):
        if reason is not None:
            raise ValueError(f"{reason} (rank {other})")


def check_same(facts: dict[str, Any]) -> None:
    """Checks that every rank has the same `facts` (plain values) and the same source code.

    Ranks that differ would train a mixture of two configurations or wait for each other forever.
    All ranks must call it.

    Raises:
        GroupError: on every rank. It names the first rank that differs from rank 0, the key, and
            both values.
    """
    if group.world_size() == 1:
        return
    gathered: list[Any] = [None] * group.world_size()
    dist.all_gather_object(gathered, {**facts, **_code()})
    first = gathered[0]
    for other, its in enumerate(gathered):
        for key in sorted({*first, *its}):
            if first.get(key) != its.get(key):
                raise GroupError(
                    f"rank {other} has {key} = {its.get(key)!r}, rank 0 has {first.get(key)!r}: "
                    "start every rank with the same command and the same code"
                )


@functools.cache
def _code() -> dict[str, str]:
    """Digest of our source files, and the version of PyTorch.

    Our version number does not change with an edit.
    """
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return {"the source of emd_fast": digest.hexdigest()[:12], "the version of PyTorch": str(torch.__version__)}


class AsyncMax:
    """Maximum over the ranks of an int, returned one call later.

    A call starts an all-reduce of its number and returns the result of the previous call, so that
    no rank waits. The first call returns 0. The all-reduce runs on the CPU: no GPU synchronizes.
    In one process a call returns its own number.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def __call__(self, number: int) -> int:
        if group.world_size() == 1:
            return number
        previous, flag = self._pending, torch.tensor([number])
        self._pending = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True))
        return _wait(previous)

    def final(self, number: int) -> int:
        """Maximum of this call and of the previous one. This call waits for the other ranks."""
        previous = self(number)
        pending, self._pending = self._pending, None
        return max(previous, number, _wait(pending))


def _wait(pending: tuple[Tensor, Any] | None) -> int:
    if pending is None:
        return 0
    flag, work = pending
    work.wait()
    return int(flag)
