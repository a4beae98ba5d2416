"""Networks that are gathered block by block: the numbers of `phase`, its collectives, what it needs of the ranks."""

import copy

import pytest
import torch
from helpers import assert_within
from test_activation_checkpoint import teacher as unet
from test_distributed import STEP, config, points, teacher, whole
from test_distributed_group import counted
from test_plan import Received
from test_plan import settings as even_settings
from test_plan import teacher as even_teacher

from emd_fast import Denoiser, EMDConfig, EMDTrainer, distributed
from emd_fast.config import ConfigError
from emd_fast.distributed import gathered, local
from emd_fast.run.plan import estimate
from emd_fast.train import networks
from emd_fast.train.parameter_counts import ParameterCounts
from emd_fast.train.preview import denoised

GROUPS = 4  # of test_distributed.Blocks: three blocks and the rest
ADAPTERS = {"adapter_rank": 2, "adapter_targets": ["0", "first", "last"]}
JOINT = {"score_passes": "joint"}


def trainer_of(changes, make=points) -> EMDTrainer:
    return EMDTrainer(*make({"parallel": "fsdp", "fake_score_warmup": 0, **changes}))


# Collectives ----------------------------------------------------------------------------------------------------------


def passes(changes) -> dict:
    """Collectives of K = 8 passes of each network, as an E-step makes them, and of the parts of a step."""
    trainer = trainer_of({"langevin_steps": 8, **changes})
    trainer.step()
    x, t, cond = torch.randn(6, 3), torch.full((6,), 0.5), torch.zeros(6, dtype=torch.int64)

    def forward(network, *given):
        with gathered(network), torch.no_grad():
            for _ in range(8):
                network(*given)

    def to_the_input():
        with gathered(trainer.generator):
            for _ in range(8):
                z = x.clone().requires_grad_()
                torch.autograd.grad(trainer.generator(z, cond), z, x)

    def generator_update():
        with gathered(trainer.generator):
            trainer._generator_loss(trainer._e_steps(None))

    return {
        "teacher": counted(lambda: forward(trainer.teacher, x, t, cond)),
        "fake_score": counted(lambda: forward(trainer.fake_score, x, t, cond)),
        "generator": counted(lambda: forward(trainer.generator, x, cond)),
        "generator, to its input": counted(to_the_input),
        "e_step": counted(lambda: trainer._e_steps(None)),
        "generator update": counted(generator_update),
        "fake-score update": counted(lambda: trainer._fake_score_update(None, 0)),
    }


def test_by_phase_a_network_is_gathered_once_whatever_k(ranks):
    found = ranks(2, passes, {"gather": "phase"})[0]
    for name in ("teacher", "fake_score", "generator", "generator, to its input"):
        assert found[name] == {"allgather_base": GROUPS}, name
    assert found["e_step"] == {"allgather_base": 3 * GROUPS}


@pytest.mark.parametrize("adapters", [{}, ADAPTERS])
def test_by_block_every_pass_gathers_each_block_once(ranks, adapters):
    found = ranks(2, passes, {"gather": "block", **adapters})[0]
    once = 8 * GROUPS
    for name in ("teacher", "fake_score", "generator"):
        assert found[name] == {"allgather_base": once}, name
    # A backward pass is a pass too: its blocks are gathered once more.
    assert found["generator, to its input"] == {"allgather_base": 2 * once}
    assert found["e_step"] == {"allgather_base": (1 + 1 + 2) * once}
    scattered = {} if adapters else {"reduce_scatter_base": GROUPS}
    assert found["generator update"] == {"allgather_base": 4 * once + 2 * GROUPS} | scattered
    # The generator's forward pass; both passes of the fake score; the norms of the gradient.
    summed = {"allreduce": 1 if adapters else 2}
    assert found["fake-score update"] == {"allgather_base": 3 * GROUPS} | scattered | summed


def e_steps(changes) -> int:
    trainer = trainer_of({"langevin_steps": 8, "gather": "block", **changes})
    return counted(lambda: trainer._e_steps(None))["allgather_base"]


def test_by_block_what_does_not_run_is_not_gathered(ranks):
    # A chain that leaves z alone runs the generator once, and one pass of both scores runs no teacher.
    assert ranks(2, e_steps, {"gamma_z": 0.0})[0] == (1 + 8 + 8) * GROUPS
    assert ranks(2, e_steps, {**ADAPTERS, **JOINT})[0] == (2 * 8 + 8) * GROUPS


def prefetched() -> list[tuple[int, int]]:
    trainer = trainer_of({"gather": "block"})
    blocks = distributed.blocks_of(trainer.generator)
    seen: list[tuple[int, int]] = []
    for index, block in enumerate(blocks):

        def look(module, given, output, index=index):
            # When the gradient of a block's output is there, which blocks have been gathered?
            groups = [b._get_fsdp_state()._fsdp_param_group for b in blocks]
            output.register_hook(
                lambda gradient: seen.append(
                    (index, sum(g.is_unsharded or g._all_gather_result is not None for g in groups))
                )
            )

        block.register_forward_hook(look)
    z = torch.randn(6, 3).requires_grad_()
    with gathered(trainer.generator):
        x = trainer.generator(z, torch.zeros(6, dtype=torch.int64))
        torch.autograd.grad(x, z, torch.ones_like(x))
    return seen


def test_a_backward_pass_gathers_the_next_block_while_one_computes(ranks):
    # The block and the one after it; the first block has none after it.
    assert ranks(2, prefetched)[0] == [(2, 2), (1, 2), (0, 1)]


def sent(changes) -> tuple[float, float]:
    """Bytes of weights that a step gathers with adapters, and those of the plan."""
    network, settings = even_teacher(), even_settings(parallel="fsdp", **ADAPTERS, **changes)
    counts = ParameterCounts.of(network, network, network, settings.adapter)
    planned = estimate(counts, settings, "fsdp", 2, reduced=False).traffic["gathering weights"]
    trainer = EMDTrainer(network, settings)
    trainer.step()
    with Received() as received:
        trainer.step()
    return received.bytes["gathering weights"], planned


@pytest.mark.parametrize("changes", [{"gather": "phase"}, {"gather": "block"}, {"gather": "block", **JOINT}])
def test_the_plan_counts_the_weights_that_adapters_gather(ranks, changes):
    for gathered_bytes, planned in ranks(2, sent, changes):
        assert gathered_bytes == pytest.approx(planned, rel=1e-6)


# Numbers --------------------------------------------------------------------------------------------------------------


def steps(changes, make=points) -> dict:
    trainer = trainer_of(changes, make)
    metrics = [trainer.step() for _ in range(2)][-1] | trainer.diagnostics() | trainer.gradient_variance()
    orders = [
        len(module._get_fsdp_state()._comm_ctx.post_forward_order)
        for network in (trainer.generator, trainer.teacher, trainer.fake_score)
        for module in distributed.fsdp._fsdp_modules(network)
        if module._get_fsdp_state()._is_root
    ]
    shown = {} if len(trainer.sample_shape) == 1 else {"shown": denoised(trainer, 2)["teacher"]}
    return {
        "state": {name: whole(value) for name, value in trainer._state.tensors().items()},
        "metrics": {key: value.item() for key, value in metrics.items()},
        "shown": {"generated": trainer.generate(3), **shown},
        "orders": orders,
        "by block": [distributed.gathers_by_block(n) for n in (trainer.generator, trainer.teacher, trainer.fake_score)],
    }


def both(changes, make=points) -> tuple[dict, dict]:
    return tuple(steps({**changes, "gather": gather}, make) for gather in ("phase", "block"))


def same(one: dict, two: dict, what: str) -> None:
    assert one[what].keys() == two[what].keys()
    for name, value in one[what].items():
        assert torch.equal(torch.as_tensor(value).nan_to_num(), torch.as_tensor(two[what][name]).nan_to_num()), name


CHANGES = [
    STEP,
    {"micro_batch_size": 2, **STEP},
    {"activation_checkpointing": True, "micro_batch_size": 3},
    {"activation_checkpointing": "all", **STEP},
    {"precision": "bfloat16"},
    {"rungs": [2.0, 1.0, 0.5]},
    {"sampling": "x_z"},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_both_give_the_same_bits(ranks, changes):
    for phase, block in ranks(2, both, changes):
        assert phase["by block"] == [False] * 3 and block["by block"] == [True] * 3
        for what in ("state", "metrics", "shown"):
            same(phase, block, what)
        # FSDP2's list of passes is emptied: it would grow with every pass without gradients.
        assert phase["orders"] + block["orders"] == [0] * 6


def pictures(changes) -> tuple[Denoiser, EMDConfig]:
    """A UNet of fused blocks, whose later blocks read the outputs of earlier ones."""
    settings = {"steps": 2, "batch_size": 4, "langevin_steps": 2, "gamma_z": 0.001, "num_classes": 3}
    return unet(), EMDConfig(**settings | changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation_checkpointing": True}, pytest.param({"compile": True}, marks=pytest.mark.exhaustive)],
)
@pytest.mark.slow
def test_both_give_the_same_bits_with_fused_blocks(ranks, changes):
    for phase, block in ranks(2, both, changes, pictures):
        assert block["orders"] == [0] * 3
        for what in ("state", "metrics", "shown"):
            same(phase, block, what)


@pytest.mark.parametrize(("world", "mode"), [(3, "fsdp"), (4, "hybrid")])
@pytest.mark.slow
def test_both_give_the_same_bits_on_more_ranks(ranks, world, mode):
    changes = {"parallel": mode, "shard_group": 2 if mode == "hybrid" else 0, **STEP}
    for phase, block in ranks(world, both, changes):
        same(phase, block, "state")


@pytest.mark.parametrize("changes", [{}, {"rungs": [2.0, 0.5]}, {"guidance": 1.5, **JOINT}])
def test_both_give_the_same_numbers_with_adapters(ranks, changes):
    """By block a block's input is a node of its own, so its gradient is summed in another order."""
    for phase, block in ranks(2, both, {**STEP, **ADAPTERS, **changes}):
        for name, value in phase["state"].items():
            assert_within(block["state"][name], value, 1e-7 + 1e-5 * float(value.abs().max()), name)
        for name, value in phase["metrics"].items():
            assert block["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok="bin" in name), name


def without_a_backward_pass() -> tuple[dict, list[bool]]:
    found, shared = [], []
    for gather in ("phase", "block"):
        changes = {"gather": gather, "gamma_z": 0.0, "langevin_steps": 3, "parallel": "fsdp"}
        torch.manual_seed(0)  # from which the teacher draws weights
        trainer = EMDTrainer(even_teacher(), even_settings(**ADAPTERS, **changes))
        for learner in trainer.learners.values():
            for parameter in learner.trainable.parameters:
                torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
        found.append(trainer.sample_posterior())
        base = {local(p).untyped_storage().data_ptr() for p in trainer.teacher.parameters()}
        own = [p for p in trainer.generator.parameters() if not p.requires_grad]
        shared += [local(p).untyped_storage().data_ptr() in base for p in own]
    assert found[0].drift.abs().max() > 1e-3
    return [{name: getattr(each, name) for name in ("eps", "drift")} for each in found], shared


def test_passes_without_gradients_give_the_same_bits_with_adapters_from_the_same_shards(ranks):
    for (phase, block), shared in ranks(2, without_a_backward_pass):
        for name, value in phase.items():
            assert torch.equal(block[name], value), name
        assert shared and all(shared)


def saved(folder, changes) -> None:
    trainer = trainer_of(changes)
    trainer.step()
    trainer.save(folder)


@pytest.mark.parametrize("adapters", [{}, ADAPTERS])
def test_a_run_by_block_resumes_by_phase(ranks, tmp_path, adapters):
    ranks(2, saved, tmp_path / "checkpoint", {"gather": "block", **STEP, **adapters})
    network, settings = points({"fake_score_warmup": 0, **STEP, **adapters})
    again = EMDTrainer.resume(tmp_path / "checkpoint", network, config=settings)
    alone = EMDTrainer(network, settings)
    alone.step()
    for trainer in (again, alone):
        trainer.step()
    for (name, mine), its in zip(again._state.tensors().items(), alone._state.tensors().values(), strict=True):
        assert_within(mine, its, 1e-6 + 1e-4 * float(its.abs().max()), name)


# What the ranks must agree on -----------------------------------------------------------------------------------------


def interrupted() -> None:
    trainer = trainer_of({"gather": "block"})
    hook = distributed.blocks_of(trainer.generator)[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.step()
    hook.remove()
    assert all(hasattr(p, "device_mesh") for p in trainer.generator.parameters() if p.dim())
    assert trainer.step()["generator_loss"].isfinite()


def test_an_error_in_a_pass_leaves_the_network_sharded_and_usable(ranks):
    ranks(2, interrupted)


def rolled_out(changes) -> list[int]:
    """Passes of the rungs before those of this rank's one sample, by step."""
    trainer = trainer_of({"rungs": [2.0, 1.0, 0.5], "batch_size": 2, "gather": "block", **changes})
    calls, found = [], []
    trainer.generator.register_forward_hook(lambda *_: calls.append(1))
    for step in range(6):
        trainer.batches.at(step)
        (batch,) = trainer.batches.micro_batches(None, 0)
        trainer.rollout(batch, 0)
        found.append(len(calls))
        calls.clear()
    return found


@pytest.mark.parametrize("adapters", [{}, ADAPTERS])
def test_every_rank_makes_the_passes_of_all_rungs(ranks, adapters):
    assert ranks(2, rolled_out, adapters) == [[2] * 6] * 2
    needed = ranks(2, rolled_out, {**adapters, "gather": "phase"})
    assert needed[0] != needed[1]  # up to the rung of the sample, so that they would not match


def refused(changes) -> str:
    with pytest.raises(ConfigError) as error:
        trainer_of({"gather": "block", **changes})
    return str(error.value)


def test_numbers_of_passes_that_differ_are_refused(ranks):
    for said in ranks(2, refused, {"batch_size": 13, "micro_batch_size": 2}):
        assert "batch_size must be a multiple of the 2 devices where gather is 'block'" in said and "\n" not in said
    trainer = EMDTrainer(teacher(), config(batch_size=13, gather="block"))  # one process
    assert trainer.parallel == "replicate: one process"


def uneven() -> None:
    steps({"batch_size": 13, "gather": "block", "micro_batch_size": 4})


def test_shares_that_differ_by_a_sample_make_the_same_passes(ranks):
    ranks(2, uneven)


def test_every_rank_says_how_it_gathers(ranks):
    for found in ranks(2, told):
        assert found == ["by phase: auto, and no memory of a GPU is known", "by block: asked for"]


def told() -> list[str]:
    return [trainer_of({"gather": gather}).parallel.partition("; gather ")[2] for gather in ("auto", "block")]


def deep_teacher() -> Denoiser:
    """Of nine blocks: more than are in memory at a time."""
    network = even_teacher()
    network.network.blocks.extend(copy.deepcopy(block) for _ in range(2) for block in network.network.blocks[:3])
    return network


def on_a_gpu(gather: str, memory: float) -> str:
    """How a trainer would gather on a GPU of this memory; nothing is allocated on it."""
    network, original = deep_teacher(), networks.available
    networks.available = lambda device: memory
    try:
        settings = even_settings(parallel="fsdp", gather=gather)
        return str(networks._gather([network] * 3, settings, "fsdp", torch.device("cuda"), torch.float32))
    except ConfigError as error:
        return str(error)
    finally:
        networks.available = original


def test_a_trainer_chooses_by_the_memory_of_its_gpu(ranks):
    network, settings = deep_teacher(), even_settings(parallel="fsdp")
    needs = estimate(ParameterCounts.of(network, network, network), settings, "fsdp", 2, reduced=False).total
    for rank in range(2):
        assert ranks(2, on_a_gpu, "auto", 2 * needs)[rank].startswith("by phase: auto: ")
        assert "by block" in ranks(2, on_a_gpu, "auto", needs)[rank]
        assert ranks(2, on_a_gpu, "phase", needs)[rank] == "by phase: asked for"
        said = ranks(2, on_a_gpu, "phase", 0.9 * needs)[rank]
        assert said.startswith("gather = 'phase' needs ") and "try gather = 'block', which needs" in said
        assert "\n" not in said
