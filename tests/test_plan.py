"""What the plan says against what a trainer holds and sends."""

from __future__ import annotations

import pytest
import torch
from spawned import Ranks
from test_distributed import Blocks, config
from torch.utils._python_dispatch import TorchDispatchMode

from emd_fast import Denoiser, EMDTrainer, cli, distributed
from emd_fast.config import ConfigError
from emd_fast.plan import GIB, Sizes, estimate, plan
from emd_fast.schedules import EDM


def teacher() -> Denoiser:
    # Sizes that two ranks divide, so that the plan can be exact: (B, 4) labels of four classes.
    network = Blocks(1, classes=4, width=8)
    network.last = torch.nn.Linear(8, 4)
    network.first = torch.nn.Linear(5, 8)
    return Denoiser(network, EDM(), "edm", sigma_data=0.5, sample_shape=(4,))


def settings(**changes):
    return config(num_classes=4, student_warmup=0, **changes)


class Received(TorchDispatchMode):
    """Bytes that this rank receives, as an ideal ring would send them."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"gathering weights": 0.0, "scattering gradients": 0.0, "summing gradients": 0.0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        ranks = distributed.world_size()
        name = func.__name__.split(".")[0].strip("_")
        if func.namespace == "c10d" and name == "allgather_base":
            self.bytes["gathering weights"] += args[0].nbytes * (ranks - 1) / ranks
        elif func.namespace == "c10d" and name == "reduce_scatter_base":
            self.bytes["scattering gradients"] += args[1].nbytes * (ranks - 1) / ranks
        elif func.namespace == "c10d" and name == "allreduce" and args[0][0].numel() > 100:  # no norms, no metrics
            self.bytes["summing gradients"] += 2 * args[0][0].nbytes * (ranks - 1) / ranks
        return func(*args, **(kwargs or {}))


def measured(mode: str, precision: str) -> tuple[dict, dict]:
    trainer = EMDTrainer(teacher(), settings(parallel=mode, precision=precision))
    trainer.step()
    with Received() as received:
        trainer.step()

    def held(tensors):
        return sum(distributed.local(tensor).nbytes for tensor in tensors)

    trained = [*trainer.generator.parameters(), *trainer.student.parameters()]
    return {
        "weights": held([*trained, *trainer.teacher.parameters()]),
        "gradients": held(p.grad for p in trained),
        "average": held(trainer.ema.module.parameters()),
        "optimizer": sum(
            held(value for state in o.state.values() for key, value in state.items() if key != "step")
            for o in (trainer.generator_optimizer, trainer.student_optimizer)
        ),
    }, received.bytes


@pytest.fixture(scope="module")
def ranks():
    group = Ranks(2)
    yield group
    group.close()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
def test_the_plan_is_what_a_trainer_holds_and_sends(ranks, mode, precision):
    network = teacher()
    sizes = Sizes.of(network, network, network)
    assert sizes.generator == sum(p.numel() for p in network.parameters()) and sizes.largest_block == 8 * 8 + 8
    planned = estimate(sizes, settings(), mode, 2, reduced=precision == "bfloat16")
    for held, received in ranks(measured, mode, precision):
        if mode == "fsdp":
            held["gradients"] += 4 * sizes.largest_block  # the one that is in the works
        for name, size in held.items():
            assert size == pytest.approx(planned.memory[name], rel=1e-6), name
        for name, size in received.items():
            assert size == pytest.approx(planned.traffic[name], rel=1e-6), name


def test_what_cannot_fit_is_refused_with_what_helps():
    sizes = Sizes(860_000_000, 860_000_000, 860_000_000, 50_000_000)

    def made(devices=64, activations=None, **changes):
        settings = config(**{"batch_size": 1024, **changes})
        return plan(sizes, settings, devices=devices, reduced=True, activations=activations)

    made(parallel="replicate").check(80 * GIB)
    with pytest.raises(ConfigError, match=r"needs 35\.\d GiB a device, and there are 20: try --parallel fsdp"):
        made(parallel="replicate").check(20 * GIB)
    with pytest.raises(ConfigError, match="try a smaller --micro-batch-size"):
        made(parallel="fsdp", activations=2 * GIB).check(20 * GIB)
    with pytest.raises(ConfigError, match="more devices, or --optimizer adamw_8bit"):
        made(devices=1).check(20 * GIB)
    # 8-bit moments, and micro-batches that take fewer samples through at a time, are seen.
    assert made(optimizer="adamw_8bit").chosen.memory["optimizer"] < made().chosen.memory["optimizer"] / 3
    assert made(devices=8, micro_batch_size=4, activations=1e9).chosen.memory["activations"] == 4e9
    assert "not known" in made().table() and "not known" not in made(activations=1e9).table()


def test_a_dry_run_prints_the_configuration_and_the_plan_and_stops(tmp_path, capsys):
    words = ["distill", "digits", "--dry-run", "--out", str(tmp_path / "x"), "--devices", "8", "--parallel", "fsdp"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert 'parallel = "fsdp"' in said and "8 devices" in said and "fsdp *" in said and "replicate" in said
    assert not (tmp_path / "x").exists()
    assert cli.main([*words, "--device-memory", "0.0001"]) == 2
    assert "parallel = 'fsdp' needs" in capsys.readouterr().err
    assert cli.main(["distill", "digits", "--devices", "8"]) == 2
    assert "--dry-run" in capsys.readouterr().err
