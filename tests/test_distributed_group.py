"""What sharded networks gather and reduce, and how often; networks that somebody else wrapped; the group of ranks."""

import itertools
import os
import time

import pytest
import torch
import torch.distributed as dist
from helpers import Mlp, assert_within, seeded
from test_distributed import Blocks, config, teacher, whole
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from emd_fast import Denoiser, EMDTrainer, Generator, Noise, distributed, e_step
from emd_fast.diffusion.schedules import Cosine
from emd_fast.distributed import gathered
from emd_fast.em.fake_score_step import fake_score_step
from emd_fast.em.m_step import m_step


class Counter(TorchDispatchMode):
    """How often each collective runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0].strip("_")
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def counted(work) -> dict[str, int]:
    with Counter() as counter:
        work()
    return counter.counts


def gathers(steps: int) -> dict:
    counts = {}
    trainer = EMDTrainer(
        teacher(), config(parallel="fsdp", langevin_steps=steps, micro_batch_size=2, fake_score_warmup=0)
    )
    trainer.step()
    micro_batches = trainer.batches.micro_batches(None, 0)

    def generator_update():
        with gathered(trainer.generator):
            trainer._generator_loss(trainer._e_steps(None))

    counts["generator update"] = counted(generator_update)
    counts["e_step"] = counted(lambda: trainer._e_step(micro_batches[0]))
    counts["fake-score update"] = counted(lambda: trainer._fake_score_update(None, 0))
    counts["groups"] = sum(1 for m in trainer.generator.modules() if type(m).__name__.startswith("FSDP"))
    return counts


def test_networks_are_gathered_once_and_gradients_reduced_once(ranks):
    few, many = ranks(2, gathers, 1)[0], ranks(2, gathers, 8)[0]
    assert few == many  # whatever the number of Langevin steps
    groups = few["groups"]
    assert groups == 4  # three blocks and the rest
    assert few["e_step"] == {"allgather_base": 3 * groups}
    assert few["generator update"] == {"allgather_base": 3 * groups, "reduce_scatter_base": groups}
    # And one all-reduce for the norms of the gradient.
    assert few["fake-score update"] == {"allgather_base": 2 * groups, "reduce_scatter_base": groups, "allreduce": 1}


def reduces() -> dict:
    trainer = EMDTrainer(teacher(), config(parallel="replicate", micro_batch_size=2, fake_score_updates=2))
    trainer.step()
    return counted(trainer.step)


def test_replicated_gradients_are_reduced_once_an_update(ranks):
    # Two fake-score updates, one of the generator, and the metrics.
    assert ranks(2, reduces)[0] == {"allreduce": 4}


def sharded_pair():
    """A network of blocks, and the same sharded by its owner."""
    bare, outer = Blocks(3), Blocks(3)
    for part in (*outer.blocks, outer):
        fully_shard(part)
    return bare, outer


def is_gathered(network) -> bool:
    (gathered,) = {not isinstance(p, DTensor) for p in network.parameters()}  # all of it or nothing
    return gathered


def nesting() -> None:
    bare, outer = sharded_pair()
    x, t = torch.randn(4, 3, generator=seeded(0)), torch.ones(4)
    with gathered(nn.Linear(2, 2), DistributedDataParallel(nn.Linear(2, 2)), lambda: 0):
        pass
    with pytest.raises(ZeroDivisionError), gathered(outer):  # before it has ever been called
        raise ZeroDivisionError
    assert not is_gathered(outer)
    with gathered(outer):
        with gathered(outer, bare):
            assert is_gathered(outer)
            outer(x, t)
        assert is_gathered(outer)
        torch.testing.assert_close(outer(x, t), bare(x, t))
    assert not is_gathered(outer)
    # An error in the middle of a pass leaves it sharded and usable.
    hook = outer.blocks[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), gathered(outer), gathered(outer):
        outer(x, t)
    hook.remove()
    assert not is_gathered(outer)
    for network in (bare, outer):
        network(x, t).square().sum().backward()
    for mine, its in zip(outer.parameters(), bare.parameters(), strict=True):
        if its.grad is not None:
            torch.testing.assert_close(mine.grad.full_tensor(), its.grad, rtol=1e-5, atol=1e-6)
    # Its own policy is back: a pass of its own gathers again what it let go.
    counts = counted(lambda: outer(x, t).sum().backward())
    assert counts == {"allgather_base": 4 + 3, "reduce_scatter_base": 4}, counts


def foreign(how: str) -> None:
    """e_step, M-step and fake-score step on networks that somebody else wrapped, each rank with half of the batch."""

    def networks():
        schedule = Cosine()
        g, t, s = (Denoiser(Mlp(seed=seed), schedule, "v") for seed in (1, 2, 3))
        return Generator(g, 0.8), t, s

    def wrapped(network):
        if how == "ddp":
            return DistributedDataParallel(network)
        options = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
        return fully_shard(network, **(options if how == "fsdp bfloat16" else {}))

    tolerance = 0.1 if how == "fsdp bfloat16" else 1e-5
    half = slice(0, 4) if dist.get_rank() == 0 else slice(4, 8)
    g = seeded(5)
    z, eps, t = torch.randn(8, 3, generator=g), torch.randn(8, 3, generator=g), 0.2 + 0.6 * torch.rand(8, generator=g)
    bare, inner = networks(), networks()
    outer = [wrapped(network) for network in inner]
    for step in range(2):
        options = {"steps": 3, "gamma_eps": 0.2, "gamma_z": 0.05}
        alone = e_step(*bare, z, eps, t, noise=Noise(0, step=step), **options)
        noise = Noise(0, step=step, first_sample=half.start)
        together = e_step(*outer, z[half], eps[half], t[half], noise=noise, **options)
        for what in ("z", "eps", "drift"):
            assert_within(getattr(together, what), getattr(alone, what)[half], 4 * tolerance, what)
        for group, result, part in ((bare, alone, slice(None)), (outer, together, half)):
            for network in (group[0], group[2]):
                network.zero_grad()
            m_step(group[0], result, torch.ones(len(result.t))).mean().backward()
            fake_score_step(group[0], group[2], z[part], eps[part], t[part]).mean().backward()
        for network, reference in ((inner[0], bare[0]), (inner[2], bare[2])):
            for mine, its in zip(network.parameters(), reference.parameters(), strict=True):
                assert mine.requires_grad and mine.grad.dtype == torch.float32
                assert_within(whole(mine.grad), its.grad, tolerance * (1 + float(its.grad.abs().max())))
        with torch.no_grad():
            for group in (bare, inner):
                for p in group[0].parameters():
                    p -= 0.1 * p.grad


def wrapped_by_others() -> None:
    for wrap in (DistributedDataParallel, fully_shard):
        network = teacher()
        network.network = wrap(network.network)
        with pytest.raises(ValueError, match="the fake_score is wrapped in DDP or FSDP2"):
            EMDTrainer(teacher(), config(), fake_score=network)


@pytest.mark.parametrize(
    ("work", "how"),
    [(nesting, ()), (foreign, ("ddp",)), (foreign, ("fsdp",)), (foreign, ("fsdp bfloat16",)), (wrapped_by_others, ())],
)
def test_networks_that_somebody_else_wrapped(ranks, work, how):
    ranks(2, work, *how)


def test_shares_cover_the_batch(monkeypatch):
    for world in (1, 2, 3, 7):
        monkeypatch.setattr(distributed.group, "world_size", lambda world=world: world)
        shares = []
        for rank in range(world):
            monkeypatch.setattr(distributed.group, "rank", lambda rank=rank: rank)
            shares.append(distributed.share(10))
        assert shares[0][0] == 0 and shares[-1][1] == 10
        assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
        assert {b - a for a, b in shares} <= {10 // world, 10 // world + 1}


def talking() -> list:
    rank = dist.get_rank()
    agree = distributed.AsyncMax()
    answers = [agree(15 if (rank == 1 and step == 2) else 0) for step in range(5)]
    answers.append(agree.final(2 if rank == 0 else 0))
    told = distributed.on_main(lambda: {"rank": rank})
    with pytest.raises((ZeroDivisionError, distributed.FailedOnMain), match="division") as failed:
        distributed.on_main(lambda: 1 / 0)
    assert getattr(failed.value, "main", True) == (rank == 0)  # that one says it
    return [answers, told]


def test_ranks_agree(ranks):
    for answers, told in ranks(2, talking):
        assert answers == [0, 0, 0, 15, 0, 2]
        assert told == {"rank": 0}


def test_an_attempt_of_torchrun_takes_no_addresses_from_the_ones_before(monkeypatch):
    def of(store, attempt):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        return distributed.group._unused(store)

    kept, fresh = dist.HashStore(), dist.HashStore()
    assert of(kept, "0") is kept
    kept.set("address", "of a rank that is dead")
    for attempt in ("1", "2"):
        mine = of(kept, attempt)
        assert not mine.check(["address"])
        mine.set("address", "of a rank that lives")
    # A store of its own is used as it is: the machines of one attempt may count differently.
    assert of(fresh, "1") is fresh


def test_one_process_is_a_group_of_one(tmp_path):
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.share(5) == (0, 5)
    assert distributed.AsyncMax()(15) == 15
    network = nn.Linear(2, 2)
    assert distributed.shard(network, "fsdp") is network and not distributed.is_sharded(network)
    assert "RANK" not in os.environ
    with distributed.process_group():
        assert not dist.is_initialized()


def test_the_mode_is_chosen_by_size(monkeypatch):
    assert distributed.resolve("auto", 10)[0] == "replicate"
    with pytest.raises(ValueError, match="mode must be one of"):
        distributed.resolve("zero", 10)
    monkeypatch.setattr(distributed.group, "world_size", lambda: 16)
    assert distributed.resolve("auto", 10**9)[0] == "replicate"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    mode, reason = distributed.resolve("auto", 10**9 + 1)
    assert mode == "hybrid" and "1,000 million" in reason
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert distributed.resolve("auto", 10**9 + 1)[0] == "fsdp"
    with pytest.raises(ValueError, match="shard_group must divide the 16 ranks, got 5"):
        distributed.make_mesh("hybrid", "cpu", 5)


def test_blocks_are_the_entries_of_the_outermost_lists():
    network = nn.Sequential(nn.Linear(1, 1), nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)]), nn.Identity()]))
    network.append(Blocks(0))
    found = distributed.blocks_of(network)
    assert found == [network[1][0][0], *network[2].blocks]


def ends_after_the_report(folder, main) -> bool:
    error = ValueError("of all ranks")
    error.main = main == distributed.rank()
    store = dist.distributed_c10d._get_default_store()

    def report(_) -> None:
        time.sleep(0.3)
        (folder / "reported").touch()

    distributed.group._report_together(error, report, store)
    return (folder / "reported").exists()


def test_no_rank_ends_before_rank_0_has_reported_an_error_of_all(ranks, tmp_path):
    assert ranks(2, ends_after_the_report, tmp_path, 0) == [True, True]
