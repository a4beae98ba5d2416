"""Ranks that were started differently: one clear line, every rank stops, nobody waits."""

from __future__ import annotations

import pytest
from spawned import Ranks, ended
from test_distributed import config, teacher
from test_distributed_run import command, started

from emd_fast import EMDTrainer, distributed
from emd_fast.distributed import GroupError, agreement


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


def refused(changes, source=None) -> tuple[str, bool]:
    """What the second rank is told that has `changes`, or another source; and the first."""
    if distributed.rank() == 0:
        changes = {}
    elif source:
        code = {**agreement._code(), "the source of emd_fast": source}
        agreement._code, original = lambda: code, agreement._code
    try:
        with pytest.raises(GroupError) as error:
            EMDTrainer(teacher(), config(**changes))
    finally:
        if source and distributed.rank() == 1:
            agreement._code = original
    return str(error.value), error.value.main


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 5}, "rank 1 has seed = 5, rank 0 has 0"),
        ({"gamma_eps": 0.25}, "rank 1 has gamma_eps = 0.25, rank 0 has 0.16"),
        ({"guidance": 2.0}, "rank 1 has guidance = 2.0, rank 0 has None"),
        ({"batch_size": 1}, "rank 1 has batch_size = 1, rank 0 has 12"),  # would be refused there alone
    ],
)
def test_another_configuration_is_named_on_all_ranks(ranks, changes, said):
    told = ranks(refused, changes)
    assert [message for message, _ in told] == [told[0][0]] * 2 and told[0][0].startswith(said)
    assert [main for _, main in told] == [True, False]


def test_other_code_is_named(ranks):
    for message, _ in ranks(refused, {}, "0123456789ab"):
        assert "rank 1 has the source of emd_fast = '0123456789ab'" in message and "the same code" in message


def misfit() -> str:
    with pytest.raises(GroupError) as error:
        EMDTrainer(teacher(), config(parallel="hybrid", shard_group=3))
    return str(error.value)


def agree() -> str:
    return EMDTrainer(teacher(), config(parallel="hybrid", shard_group=1)).parallel


def test_groups_that_do_not_make_up_the_ranks_are_refused_and_those_that_agree_go_on(ranks):
    assert ranks(misfit) == ["shard_group must divide the 2 ranks, got 3"] * 2
    assert all(said.startswith("hybrid") for said in ranks(agree))


@pytest.mark.parametrize(
    ("mine", "its", "said"),
    [
        ({"seed": 0}, {"seed": 1}, "rank 1 has emd.seed = 1, rank 0 has 0"),
        ({"parallel": "hybrid", "shard_group": 3},) * 2 + ("shard_group must divide the 2 ranks, got 3",),
    ],
)
def test_a_run_says_it_once_and_every_rank_stops(tmp_path, mine, its, said):
    words = [command(tmp_path / "run", **options) for options in (mine, its)]
    results = ended(started(words[0], 2, words))
    assert [code for code, _ in results] == [2, 2], results
    assert [line for line in results[0][1].splitlines() if line.startswith("emd-fast:")] == [
        line for line in results[0][1].splitlines() if said in line
    ]
    assert results[0][1].count(said) == 1 and said not in results[1][1] and "Traceback" not in results[1][1]
    assert not (tmp_path / "run" / "log.jsonl").exists()
