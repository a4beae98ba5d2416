"""What the plan says against what a trainer holds and sends."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import FlopCount
from test_distributed import Blocks, config
from test_trainer import digits_teacher
from torch.utils._python_dispatch import TorchDispatchMode

from emd_fast import Denoiser, EMDTrainer, Generator, distributed
from emd_fast import config as configuration
from emd_fast.config import ConfigError
from emd_fast.diffusion.schedules import EDM
from emd_fast.distributed import GroupError
from emd_fast.run import distill
from emd_fast.run.plan import Ceilings, estimate, plan
from emd_fast.run.work import Work
from emd_fast.train.memory import GIB
from emd_fast.train.parameter_counts import ParameterCounts


def teacher() -> Denoiser:
    # Sizes that two ranks divide, so that the plan can be exact: (B, 4) labels of four classes.
    network = Blocks(1, classes=4, width=8)
    network.last = torch.nn.Linear(8, 4)
    network.first = torch.nn.Linear(5, 8)
    return Denoiser(network, EDM(), "edm", sigma_data=0.5, sample_shape=(4,))


def settings(**changes):
    return config(num_classes=4, fake_score_warmup=0, **changes)


class Received(TorchDispatchMode):
    """Bytes that this rank receives, as an ideal ring would send them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = dict.fromkeys(("gathering weights", "scattering gradients", "summing gradients"), 0.0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0].strip("_") if func.namespace == "c10d" else None
        passed = 1 - 1 / distributed.world_size()
        if name == "allgather_base":
            self.bytes["gathering weights"] += args[0].nbytes * passed
        elif name == "reduce_scatter_base":
            self.bytes["scattering gradients"] += args[1].nbytes * passed
        elif name == "allreduce" and args[0][0].numel() > 100:  # no norms, no metrics
            self.bytes["summing gradients"] += 2 * args[0][0].nbytes * passed
        return func(*args, **(kwargs or {}))


def measured(mode: str, precision: str, changes: dict) -> tuple[dict, dict]:
    trainer = EMDTrainer(teacher(), settings(parallel=mode, precision=precision, **changes))
    trainer.step()
    with Received() as received:
        trainer.step()

    def held(tensors):
        return sum(distributed.local(tensor).nbytes for tensor in tensors)

    trained = [*trainer.generator.parameters(), *trainer.fake_score.parameters()]
    return {
        "weights": held([*trained, *trainer.teacher.parameters()]),
        "gradients": held(p.grad for p in trained),
        "average": held(trainer.ema.module.parameters()),
        "optimizer": sum(
            held(value for state in o.state.values() for key, value in state.items() if key != "step")
            for o in (learner.optimizer for learner in trainer.learners.values())
        ),
    }, received.bytes


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("replicate", {}),
        ("fsdp", {}),
        ("fsdp", {"gather": "block"}),
        ("fsdp", {"gather": "block", "sampling": "x_z", "rungs": [2.0, 1.0, 0.5], "fake_score_updates": 1}),
        ("fsdp", {"gather": "block", "gamma_z": 0.0, "micro_batch_size": 2}),
        ("fsdp", {"gather": "block", "objective": "sid"}),
    ],
)
def test_the_plan_is_what_a_trainer_holds_and_sends(ranks, mode, changes, precision):
    network = teacher()
    counts = ParameterCounts.of(network, network, network)
    assert counts.generator == sum(p.numel() for p in network.parameters()) and counts.largest_block == 8 * 8 + 8
    planned = estimate(counts, settings(**changes), mode, 2, reduced=precision == "bfloat16")
    for held, received in ranks(2, measured, mode, precision, changes):
        if mode == "fsdp":  # the one that is in the works
            held["gradients"] += 4 * (counts.generator if "micro_batch_size" in changes else counts.largest_block)
        for name, size in held.items():
            assert size == pytest.approx(planned.memory[name], rel=1e-6), name
        for name, size in received.items():
            assert size == pytest.approx(planned.traffic[name], rel=1e-6), name


def test_what_cannot_fit_is_refused_with_what_helps():
    counts = ParameterCounts(860_000_000, 860_000_000, 860_000_000, 50_000_000)

    def made(devices=64, activations=None, **changes):
        settings = config(**{"batch_size": 1024, **changes})
        return plan(counts, settings, devices=devices, reduced=True, activations=activations)

    made(parallel="replicate").check(80 * GIB)
    with pytest.raises(ConfigError, match=r"needs 35\.\d GiB a device, and there are 20: try --parallel fsdp"):
        made(parallel="replicate").check(20 * GIB)
    with pytest.raises(ConfigError, match="try a smaller --micro-batch-size"):
        made(parallel="fsdp", activations=2 * GIB).check(20 * GIB)
    with pytest.raises(ConfigError, match="more devices, or --optimizer-name adamw_8bit"):
        made(devices=1).check(20 * GIB)
    # 8-bit moments, and micro-batches that take fewer samples through at a time, are seen.
    assert made(optimizer_name="adamw_8bit").chosen.memory["optimizer"] < made().chosen.memory["optimizer"] / 3
    assert made(devices=8, micro_batch_size=4, activations=1e9).chosen.memory["activations"] == 4e9
    assert made().table().count("not known") == made(activations=1e9).table().count("not known") + 2
    with pytest.raises(ConfigError, match="at least the number of devices, 64, got 32"):
        made(batch_size=32)
    with pytest.raises(GroupError, match="shard_group must divide the 64 ranks, got 5"):
        made(parallel="hybrid", shard_group=5)
    with pytest.raises(GroupError, match="got 0"):  # how many a machine has is not known here
        made(parallel="hybrid")


AT_A_TIME = dict.fromkeys(("generator", "teacher", "fake_score"), 10**9)
SMALL_BLOCKS = ParameterCounts(12 * 10**9, 12 * 10**9, 12 * 10**9, 2 * 10**8, at_a_time=AT_A_TIME)


def gathered_by(available, counts=SMALL_BLOCKS, **changes):
    made = plan(counts, config(batch_size=8, parallel="fsdp", **changes), devices=8, reduced=True, available=available)
    return made.chosen.gather, made


def test_gather_is_chosen_by_memory_and_says_why():
    by = {}
    for room in (300, 180, 150, 120):
        gather, _ = gathered_by(room * GIB)
        by[room] = [gather.by[name] for name in ("teacher", "fake_score", "generator")]
        assert f"of {room} GiB" in gather.reason and "auto" in gather.reason
    assert by == {
        300: ["phase", "phase", "phase"],
        180: ["block", "phase", "phase"],
        150: ["block", "block", "phase"],
        120: ["block", "block", "block"],
    }
    gather, made = gathered_by(None)
    assert set(gather.by.values()) == {"phase"} and "no memory of a GPU is known" in gather.reason
    table = made.table()
    assert "gather: auto" in table and all(f"{name} is gathered by" in table for name in gather.by)
    # Activations that are known leave more room than those that are not.
    known = plan(
        SMALL_BLOCKS,
        config(batch_size=8, parallel="fsdp"),
        devices=8,
        reduced=True,
        available=180 * GIB,
        activations=1e6,
    )
    assert set(known.chosen.gather.by.values()) == {"phase"}
    # Adapters follow their base; a network without blocks gains nothing.
    adapted = dataclasses.replace(SMALL_BLOCKS, generator=10**8, fake_score=10**8, adapters=("generator", "fake_score"))
    gather, _ = gathered_by(40 * GIB, adapted, adapter_rank=64)
    assert set(gather.by.values()) == {"block"}
    whole = dataclasses.replace(SMALL_BLOCKS, at_a_time={})
    assert set(gathered_by(40 * GIB, whole)[0].by.values()) == {"phase"}


def test_phase_that_cannot_fit_is_refused_with_what_helps():
    _, made = gathered_by(120 * GIB, gather="phase")
    with pytest.raises(ConfigError, match=r"with gather = 'phase' needs .*: try --gather block, which needs") as error:
        made.check(120 * GIB)
    assert "\n" not in str(error.value)
    gathered_by(120 * GIB, gather="block")[1].check(120 * GIB)
    with pytest.raises(ConfigError, match="batch_size must be a multiple of the 8 devices where gather is 'block'"):
        plan(SMALL_BLOCKS, config(batch_size=9, micro_batch_size=1, parallel="fsdp", gather="block"), devices=8)


CHANGES = [
    {}, {"guidance": 1.5, "fake_score_updates": 1}, {"objective": "vsd"}, {"sampling": "x_z", "langevin_steps": 3},
    {"gamma_z": 0.0, "langevin_steps": 3}, {"objective": "sid"}, {"objective": "sid", "guidance": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES)
def test_the_operations_are_those_of_a_step(changes):
    network = digits_teacher()
    network.null_cond = 0
    settings = config(**{"batch_size": 4, "fake_score_warmup": 0, "gamma_z": 0.02, **changes})
    work = Work.of(network, Generator(network, settings.t_star), network, settings.num_classes)
    with FlopCount() as forward, torch.no_grad():
        network(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    # PyTorch's counter does not know the CPU's attention, a fiftieth of this network.
    assert 0.95 * work.teacher < forward.total <= work.teacher == work.generator == work.fake_score
    trainer = EMDTrainer(network, settings)
    with FlopCount() as counted:
        trainer.step()
    # First layers have no gradient to their input: a little less is done than is planned.
    assert 0.95 * work.step(settings) < counted.total / 4 <= work.step(settings)


def test_activations_that_are_computed_again_are_a_forward_pass_more():
    work = Work(teacher=1.0, generator=10.0, fake_score=100.0)
    again = config(activation_checkpointing=True)
    assert work.step(again) - work.step(config()) == 10.0 + again.fake_score_updates * 100.0
    for changes in ({}, {"sampling": "x_z"}, {"gamma_z": 0.0}):
        every = work.step(config(activation_checkpointing="all", **changes))
        steps = 0 if "gamma_z" in changes else again.langevin_steps
        assert every - work.step(config(activation_checkpointing=True, **changes)) == steps * 10.0


def test_times_are_those_of_the_ceilings():
    counts, settings = ParameterCounts(10**9, 10**9, 10**9, 10**8), config(batch_size=64, parallel="fsdp")
    work = Work(1e12, 2e12, 3e12)

    def seconds(devices, operations=None, received=None):
        made = plan(counts, settings, devices=devices, work=work, ceilings=Ceilings(operations, received))
        return made.chosen.seconds, sum(made.chosen.traffic.values())

    told, received = seconds(8, 1e14, 1e9)
    assert told["computing"] == pytest.approx(8 * work.step(settings) / 1e14)
    assert told["network"] == pytest.approx(received / 1e9) and received > 0
    assert told["a step, at least"] == max(told["computing"], told["network"])
    assert seconds(8, operations=1e14)[0]["a step, at least"] is None
    assert seconds(8, received=1e9)[0]["computing"] is None
    alone = seconds(1, operations=1e14)[0]  # nothing is sent
    assert alone["network"] == 0 and alone["a step, at least"] == alone["computing"]


def test_the_figures_of_the_docs_are_those_of_the_code(capsys):
    text = (Path(__file__).resolve().parents[1] / "docs" / "distributed.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})
    rows = capsys.readouterr().out
    assert len(rows.splitlines()) == 16 and rows in text


def test_plan_prints_the_configuration_and_the_table_and_writes_nothing(call, refused, tmp_path, monkeypatch):
    words = ["plan", "digits", "--devices", "8", "--parallel", "fsdp"]
    code, said, _ = call(*words)
    assert code == 0 and not list(tmp_path.iterdir())
    assert 'parallel = "fsdp"' in said and "8 devices" in said and "fsdp *" in said and "replicate" in said
    refused(2, "parallel = 'fsdp' needs", *words, "--device-memory", "0.0001")
    refused(2, "unknown option '--devices'", "distill", "digits", "--devices", "8")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "4 devices" in call("plan", "digits")[1]


def test_what_cannot_fit_is_refused_before_it_is_allocated(refused, monkeypatch):
    monkeypatch.setattr(distill, "available", lambda device: float(GIB))
    width = ["--mixture.generator-width", "60000", "--mixture.fake-score-width", "60000"]
    refused(2, "GiB a device, and there are 1: try", "distill", "gmm", "--out", "x", *width)


@pytest.mark.parametrize("recipe", ["gmm", "digits"])
def test_a_plan_is_made_of_shapes_alone(recipe, monkeypatch):
    seen, original = [], ParameterCounts.of
    monkeypatch.setattr(distill.ParameterCounts, "of", lambda *given: seen.extend(given[:3]) or original(*given))
    distill.plan_of(configuration.load(recipe), 4, Ceilings(1e12, 1e9))
    networks = [each for each in seen if isinstance(each, torch.nn.Module)]
    parameters = [p for network in networks for p in network.parameters()]
    assert len(networks) == 3 and parameters and all(p.is_meta for p in parameters)


def test_plan_takes_ceilings_and_any_key_and_invents_nothing(call, refused):
    words = ["plan", "gmm", "--devices", "4"]
    times = [line for line in call(*words)[1].splitlines() if "seconds" in line]
    assert len(times) == 3 and all(line.count("not known") == 2 for line in times)
    ceilings = ["--tflops", "10", "--gb-per-second", "1", "--langevin-steps"]
    whole = call(*words, *ceilings, "16")[1]
    assert not [line for line in whole.splitlines() if "seconds" in line and "not known" in line]
    assert call(*words, *ceilings, "32")[1] != whole
    for more, said in (
        (["--langevin-stepz", "4"], "did you mean '--langevin-steps'"),
        (["--parallel", "hybrid", "--shard-group", "3"], "shard_group must divide the 4 ranks, got 3"),
        (["--batch-size", "2"], "at least the number of devices, 4, got 2"),
        (["--device-memory", "1e-6"], "GiB a device"),
    ):
        assert call(*words, *more)[0] == 2 and said in call(*words, *more)[2]
    assert call(*words, "--tflops", "0")[0] == 2
