"""What the ranks tell each other, in plain values: the same result or error on all of them, and whether they agree."""

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
    """What all ranks find wrong at the same moment, in the same words: the main one alone has to say it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.main = group.is_main()


class FailedOnMain(RuntimeError):
    """What another rank is told of an error that the main one meets, and says."""

    main = False


def on_main(work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on all of them; the others wait.

    Raises:
        Whatever `work` raises there; FailedOnMain, with its message, on the other ranks.
    """
    if group.world_size() == 1:
        return work()
    told: list[Any] = [None, None]
    failure: BaseException | None = None
    if group.is_main():
        try:
            told[0] = work()
        except BaseException as error:
            failure, told[1] = error, f"{type(error).__name__} on rank 0: {error}"
            vars(error)["main"] = True  # the others know
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise FailedOnMain(told[1])
    return told[0]


def raise_together(error: ValueError | None) -> None:
    """Raises what any rank met on all of them: alone with an error, a rank would leave the others waiting for it."""
    told: list[str | None] = [None] * group.world_size()
    if group.world_size() > 1:
        dist.all_gather_object(told, None if error is None else str(error))
    if error is not None:
        raise error
    for other, reason in enumerate(told):
        if reason is not None:
            raise ValueError(f"{reason} (rank {other})")


def check_same(facts: dict[str, Any]) -> None:
    """Whether all ranks have the same facts, plain values, and the same code: ranks that differ would train something
    that none of them was asked for, or wait for each other for ever. All ranks call it alike.

    Raises:
        GroupError: on all ranks alike, naming the first rank that differs from rank 0, in what, and both values.
    """
    if group.world_size() == 1:
        return
    told: list[Any] = [None] * group.world_size()
    dist.all_gather_object(told, {**facts, **_code()})
    first = told[0]
    for other, its in enumerate(told):
        for key in sorted({*first, *its}):
            if first.get(key) != its.get(key):
                raise GroupError(
                    f"rank {other} has {key} = {its.get(key)!r}, rank 0 has {first.get(key)!r}: "
                    "start every rank with the same command and the same code"
                )


@functools.cache
def _code() -> dict[str, str]:
    """What tells two installations apart; the source, since a version number stays while files are edited."""
    folder, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return {"the source of emd_fast": digest.hexdigest()[:12], "the version of PyTorch": str(torch.__version__)}


class Agreement:
    """The largest number that any rank has given, told to all ranks in the same call.

    The answer is that of the call before, which has arrived by then: nobody waits, and no GPU is asked. In one process
    it is the number itself.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def __call__(self, number: int) -> int:
        if group.world_size() == 1:
            return number
        before, flag = self._pending, torch.tensor([number])
        self._pending = (flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True))
        return _arrived(before)

    def final(self, number: int) -> int:
        """The answer of this call and of the one before it; this one waits."""
        before = self(number)
        pending, self._pending = self._pending, None
        return max(before, number, _arrived(pending))


def _arrived(pending: tuple[Tensor, Any] | None) -> int:
    if pending is None:
        return 0
    flag, work = pending
    work.wait()
    return int(flag)
