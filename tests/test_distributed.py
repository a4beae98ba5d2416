"""Several ranks against one: the same noise, the same gradients; what is gathered, and how often."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import os
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from helpers import Mlp, assert_within, randomised, seeded
from spawned import Ranks
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from emd_fast import Denoiser, EMDConfig, EMDTrainer, Generator, Noise, distributed, e_step, fusion_report
from emd_fast.config import ConfigError
from emd_fast.diffusion.schedules import EDM, Cosine
from emd_fast.distributed import gathered
from emd_fast.em.fake_score_step import fake_score_step
from emd_fast.em.m_step import m_step
from emd_fast.teachers.small_unet import SmallUNet
from emd_fast.train import health
from emd_fast.train.preview import denoised


@pytest.fixture(scope="module")
def ranks():
    """work on two, three or four ranks, which all tests here share."""
    groups = {world: Ranks(world) for world in (2, 3, 4)}
    yield lambda world, work, *arguments: groups[world](work, *arguments)
    for group in groups.values():
        group.close()


class Blocks(nn.Module):
    """network(x, t, cond) of a first layer, three blocks and a last layer; sizes that two ranks do not divide."""

    def __init__(self, seed: int, classes: int = 3, width: int = 7, gain: bool = False) -> None:
        super().__init__()
        # A number alone, which cannot be split.
        self.gain = nn.Parameter(torch.ones(())) if gain else 1.0
        self.first = nn.Linear(4, width)
        self.label = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(width, 3)
        self.register_buffer("scale", torch.full((1,), 1.5))
        randomised(self, seed)

    def forward(self, x, t, cond=None):
        h = self.first(torch.cat([x, t[:, None].to(x.dtype)], dim=1))
        if cond is not None:
            h = h + self.label(cond)
        for block in self.blocks:
            h = h + block(h)
        return self.scale * self.gain * self.last(h)


def teacher(seed: int = 1, gain: bool = False) -> Denoiser:
    return Denoiser(Blocks(seed, gain=gain), EDM(), "edm", sigma_data=0.5, sample_shape=(3,), null_cond=0)


def config(**changes) -> EMDConfig:
    return EMDConfig(
        **{
            "steps": 4,
            "batch_size": 12,
            "langevin_steps": 2,
            "num_classes": 3,
            "gamma_z": [[0.1, 0.001], [1.0, 0.02]],
            "fake_score_warmup": 1,
            **changes,
        }
    )


# One run on any number of ranks ---------------------------------------------------------------------------------------


def one_step(settings: EMDConfig, world_dependent_start: bool = False) -> dict:
    """What the first step draws, gives as gradients and leaves; whole tensors."""
    # Ranks that start from different weights take those of rank 0.
    trainer = EMDTrainer(teacher(1 + (distributed.rank() if world_dependent_start else 0), gain=True), settings)
    drawn, samples = {}, []
    original = trainer._e_step

    def watched(micro_batch):
        result = original(micro_batch)
        samples.append((micro_batch.first, result))
        return result

    trainer._e_step = watched
    metrics = trainer.step() | trainer.diagnostics()
    for first, result in samples:
        for i in range(len(result.t)):
            drawn[first + i] = (result.t[i].clone(), result.cond[i].clone())
    gradients = {
        f"{name}.{key}": whole(value.grad)
        for name in ("generator", "fake_score")
        for key, value in getattr(trainer, name).named_parameters()
    }
    metrics |= trainer.gradient_variance()
    return {
        "drawn": drawn,
        "state": {
            f"{name}.{key}": whole(value)
            for name in ("generator", "fake_score")
            for key, value in getattr(trainer, name).named_parameters()
        },
        "gradients": gradients,
        "ema": {key: whole(value) for key, value in trainer.ema.module.state_dict().items()},
        "metrics": {key: value.item() for key, value in metrics.items()},
        "shown": torch.stack([trainer.generate(3), *denoised(trainer, 3).values()]),
    }


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_same_step(results, alone):
    drawn = {}
    for result in results:
        drawn |= result["drawn"]
    assert drawn.keys() == alone["drawn"].keys()
    for sample, (t, cond) in alone["drawn"].items():
        assert torch.equal(drawn[sample][0], t) and torch.equal(drawn[sample][1], cond), sample
    for result in results:
        for what in ("gradients", "ema"):
            for key, value in alone[what].items():
                largest = float(value.abs().max())
                assert_within(result[what][key], value, 1e-6 + 2e-5 * largest, f"{what} {key}")
        assert result["metrics"].keys() == alone["metrics"].keys()
        for key, value in alone["metrics"].items():
            # A bin of log-SNR without a sample is NaN.
            assert result["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok="bin" in key), key
        torch.testing.assert_close(result["shown"], alone["shown"], rtol=1e-4, atol=1e-5)


# Plain gradient steps, so that the weights after a step show the gradients before clipping and AdamW's sign.
STEP = {"fake_score_updates": 1, "grad_clip": 0.5, "guidance": 1.5}


@pytest.mark.parametrize("micro", [1, 5])
def test_micro_batches_leave_the_step_as_it_is(micro):
    assert_same_step([one_step(config(micro_batch_size=micro, **STEP))], one_step(config(**STEP)))


def several(settings_of: list[EMDConfig]) -> list[dict]:
    return [one_step(settings, world_dependent_start=True) for settings in settings_of]


@pytest.mark.parametrize(
    ("world", "modes"), [(2, ("replicate", "fsdp")), (3, ("replicate", "fsdp")), (4, ("fsdp", "hybrid"))]
)
def test_the_same_step_on_any_number_of_ranks(ranks, world, modes):
    settings = [
        config(parallel=mode, shard_group=2 if mode == "hybrid" else 0, micro_batch_size=micro, **STEP)
        for mode, micro in itertools.product(modes, (1, 2, 4))
    ]
    # 13 samples: shares that differ.
    settings.append(dataclasses.replace(settings[-1], batch_size=13, micro_batch_size=0, activation_checkpointing=True))
    results = ranks(world, several, settings)
    alone = {size: one_step(config(batch_size=size, **STEP)) for size in (12, 13)}
    for index, each in enumerate(settings):
        assert_same_step([ranks[index] for ranks in results], alone[each.batch_size])


def from_rank_0(mode: str) -> dict:
    network = teacher(gain=True)
    network.register_buffer("table", torch.arange(3.0), persistent=False)
    if distributed.rank():
        network.to("meta")
    settings = config(parallel=mode, **STEP)
    trainer = EMDTrainer(network, settings)
    assert torch.equal(trainer.teacher.table, torch.arange(3.0))
    assert not any(p.is_meta for net in (trainer.teacher, trainer.ema.module) for p in net.parameters())
    trainer.step()
    return {key: whole(value) for key, value in trainer.ema.module.state_dict().items()}


@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
def test_ranks_without_weights_take_those_of_rank_0(ranks, mode):
    alone = one_step(config(**STEP))["ema"]
    for result in ranks(2, from_rank_0, mode):
        for key, value in alone.items():
            assert_within(result[key], value, 1e-6 + 2e-5 * float(value.abs().max()), key)


def fused_from_rank_0(mode: str) -> dict:
    network = images()
    if distributed.rank():
        network.to("meta")
    # As fuse() lays weights out on a GPU.
    trainer = EMDTrainer(network.to(memory_format=torch.channels_last), images_config(parallel=mode))
    trainer.step()
    assert all(fusion_report(net).fused for net in (trainer.teacher, trainer.generator, trainer.fake_score))
    return {key: whole(value) for key, value in trainer.ema.module.state_dict().items()}


def images() -> Denoiser:
    network = SmallUNet(1, 8, num_classes=3)
    randomised(network, 4)
    return Denoiser(network, EDM(), "edm", sigma_data=0.5, sample_shape=(1, 4, 4))


def images_config(**changes) -> EMDConfig:
    return EMDConfig(
        **{"steps": 2, "batch_size": 4, "langevin_steps": 2, "gamma_z": 0.001, "num_classes": 3, **changes}
    )


@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
def test_fused_networks_on_two_ranks(ranks, mode):
    alone = EMDTrainer(images(), images_config(fuse=False))
    alone.step()
    for result in ranks(2, fused_from_rank_0, mode):
        for key, value in alone.ema.module.state_dict().items():
            assert_within(result[key], value, 1e-6 + 1e-4 * float(value.abs().max()), key)


def test_two_ranks_with_fewer_samples_are_refused(ranks):
    for error in ranks(2, refused):
        assert "batch_size must be at least the number of ranks, 2, got 1" in error


def refused() -> str:
    with pytest.raises(ConfigError) as error:
        EMDTrainer(teacher(), config(batch_size=1))
    return str(error.value)


# Reduced precision, frozen teacher ------------------------------------------------------------------------------------


def reduced() -> dict:
    trainer = EMDTrainer(teacher(), config(parallel="fsdp", precision="bfloat16"))
    trainer.step()
    metrics = trainer.step()
    return {
        "teacher": {p.dtype for p in trainer.teacher.parameters()},
        "weights": {p.dtype for net in (trainer.generator, trainer.fake_score) for p in net.parameters()},
        "gradients": {p.grad.dtype for net in (trainer.generator, trainer.fake_score) for p in net.parameters()},
        "optimizer": {v.dtype for s in trainer.learners["generator"].optimizer.state.values() for v in s.values()},
        "trains": [any(p.requires_grad for p in n.parameters()) for n in (trainer.teacher, trainer.ema.module)],
        "sharded": [distributed.is_sharded(n) for n in (trainer.teacher, trainer.generator, trainer.ema.module)],
        "metrics": {key: value.item() for key, value in metrics.items()},
    }


def test_sharding_computes_in_bfloat16_and_keeps_float32_weights(ranks):
    alone = EMDTrainer(teacher(), config(precision="bfloat16"))
    alone.step()
    expected = {key: value.item() for key, value in alone.step().items()}
    for result in ranks(2, reduced):
        assert result["teacher"] == {torch.bfloat16}
        assert result["weights"] == result["gradients"] == result["optimizer"] == {torch.float32}
        assert result["trains"] == [False, False] and result["sharded"] == [True, True, True]
        for key in ("z_rms", "fake_score_loss", "fake_score_grad_norm"):
            assert result["metrics"][key] == pytest.approx(expected[key], rel=0.05), key


# Gathering ------------------------------------------------------------------------------------------------------------


class _Counter(TorchDispatchMode):
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
    with _Counter() as counter:
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
    assert few["fake-score update"] == {
        "allgather_base": 2 * groups,
        "reduce_scatter_base": groups,
        "allreduce": 1,
    }


def reduces() -> dict:
    trainer = EMDTrainer(teacher(), config(parallel="replicate", micro_batch_size=2, fake_score_updates=2))
    trainer.step()
    return counted(trainer.step)


def test_replicated_gradients_are_reduced_once_an_update(ranks):
    # Two fake-score updates, one of the generator, and the metrics.
    assert ranks(2, reduces)[0] == {"allreduce": 4}


def sharded_pair(policy=None):
    """A network of blocks, and the same sharded by its owner."""
    from torch.distributed.fsdp import fully_shard

    bare, outer = Blocks(3), Blocks(3)
    for block in outer.blocks:
        fully_shard(block, **({"mp_policy": policy} if policy else {}))
    fully_shard(outer, **({"mp_policy": policy} if policy else {}))
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


def test_gathering_nests_survives_errors_and_leaves_the_policy(ranks):
    ranks(2, nesting)


def foreign(how: str) -> None:
    """e_step, M-step and fake-score step on networks that somebody else wrapped, each rank with half of the batch."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

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


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp bfloat16"])
def test_the_algorithm_on_networks_that_somebody_else_wrapped(ranks, how):
    ranks(2, foreign, how)


def wrapped_by_others() -> None:
    from torch.distributed.fsdp import fully_shard

    for wrap in (DistributedDataParallel, fully_shard):
        network = teacher()
        network.network = wrap(network.network)
        with pytest.raises(ValueError, match="the fake_score is wrapped in DDP or FSDP2"):
            EMDTrainer(teacher(), config(), fake_score=network)


def test_the_trainer_wants_bare_networks(ranks):
    ranks(2, wrapped_by_others)


# Waiting for the device -----------------------------------------------------------------------------------------------


class _Asks(TorchDispatchMode):
    """Who asks for the value of a tensor, which on a GPU makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.__name__.startswith(("_local_scalar_dense", "equal", "is_nonzero", "nonzero")):
            frames = [f for f in traceback.extract_stack() if "emd_fast" in f.filename and "tests" not in f.filename]
            self.callers.add(os.path.basename(frames[-1].filename))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [{}, {"guidance": 1.5, "lr_schedule": "cosine", "micro_batch_size": 5}])
def test_a_step_asks_no_device_for_values(changes):
    trainer = EMDTrainer(teacher(), config(gamma_eps=[[0.1, 0.1], [1.0, 0.2]], **changes))
    trainer.step()
    with _Asks() as asks:
        trainer.step()
        trainer.diagnostics()
    # These look at values of CPU tensors, and of no others.
    assert asks.callers <= {"schedules.py", "_check.py"}


# What is not finite ---------------------------------------------------------------------------------------------------


def poisoned(mode: str) -> tuple:
    trainer = EMDTrainer(teacher(), config(parallel=mode))
    trainer.step()
    before = {key: whole(value) for key, value in trainer.generator.state_dict().items()}
    fake_score_before = {key: whole(value) for key, value in trainer.fake_score.state_dict().items()}
    weight = next(block[0].weight for block in trainer.generator.modules() if isinstance(block, nn.Sequential))

    def hook(module, inputs, output):
        # One sample of one rank.
        if torch.is_grad_enabled() and distributed.rank() == 1:
            output.register_hook(lambda gradient: gradient * math.nan)

    block = trainer.generator.denoiser.network.blocks[1]
    handle = block[0].register_forward_hook(hook)
    assert weight.requires_grad
    sampled = trainer.sample_posterior()
    trainer._generator_loss([sampled])
    trainer._update("generator")
    handle.remove()
    trainer._fake_score_update(None, 0)
    same = all(torch.equal(before[key], whole(value)) for key, value in trainer.generator.state_dict().items())
    moved = any(not torch.equal(fake_score_before[k], whole(v)) for k, v in trainer.fake_score.state_dict().items())
    return same, moved, trainer.skipped.item(), health.culprit(trainer.learners)


@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_all(ranks, mode):
    for same, moved, skipped, culprit in ranks(2, poisoned, mode):
        assert same and moved and skipped == 1
        assert culprit == "denoiser.network.first.weight of the generator"


# The group ------------------------------------------------------------------------------------------------------------


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
    network.append(copy.deepcopy(Blocks(0)))
    found = distributed.blocks_of(network)
    assert found == [network[1][0][0], *network[2].blocks]
