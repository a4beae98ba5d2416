"""Shards in host memory: the policy of FSDP2, the same bits as without, what the plan counts and what is refused.

On a CPU host and device memory are one, so the copies between them are not seen here.
"""

import unittest.mock

import pytest
import torch
from test_distributed import STEP, config, points, whole
from test_distributed import teacher as points_teacher
from test_gathering import ADAPTERS, even_settings, even_teacher
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy

from emd_fast import EMDTrainer, distributed
from emd_fast.config import ConfigError
from emd_fast.distributed import rows
from emd_fast.run.plan import plan
from emd_fast.train.memory import offloaded
from emd_fast.train.parameter_counts import ParameterCounts

NETWORKS = ("generator", "teacher", "fake_score")


def policies(network) -> set[type]:
    return {
        type(group.offload_policy)
        for module in distributed.fsdp._fsdp_modules(network)
        for group in distributed.fsdp._groups(module._get_fsdp_state())
    }


def steps(changes, from_rank_0=False) -> dict:
    network, settings = points({"parallel": "fsdp", **changes})
    if from_rank_0 and distributed.rank():
        network.to("meta")
    trainer = EMDTrainer(network, settings)
    metrics = [trainer.step() for _ in range(2)][-1] | trainer.gradient_variance()
    return {
        "state": {name: whole(value) for name, value in trainer._state.tensors().items()},
        "metrics": {key: value.item() for key, value in metrics.items()},
        "away": [CPUOffloadPolicy in policies(getattr(trainer, name)) for name in NETWORKS],
        "ema": CPUOffloadPolicy in policies(trainer.ema.module),
    }


def with_and_without(changes, offload, from_rank_0) -> list[dict]:
    return [steps({**changes, "offload": away}, from_rank_0) for away in ([], offload)]


CASES = [
    ({}, ["teacher", "fake_score"], [False, True, True]),
    ({"gather": "block", "micro_batch_size": 2, "precision": "bfloat16"}, ["fake_score"], [False, False, True]),
    ({"gather": "block", **ADAPTERS}, ["teacher"], [True, True, True]),
    # By phase networks with an adapter have no hooks: the base is gathered for them.
    ({"gather": "phase", **ADAPTERS}, ["teacher"], [True, True, True]),
]


@pytest.mark.parametrize("from_rank_0", [False, True])
@pytest.mark.parametrize(("changes", "offload", "away"), CASES)
@pytest.mark.slow
def test_the_policy_reaches_fsdp_and_training_keeps_its_bits(ranks, changes, offload, away, from_rank_0):
    for without, found in ranks(2, with_and_without, {**STEP, **changes}, offload, from_rank_0):
        assert without["away"] == [False] * 3 and found["away"] == away
        assert found["ema"] is (away[0] and not without["ema"])
        assert found["state"].keys() == without["state"].keys()
        for name, value in without["state"].items():
            assert torch.equal(found["state"][name], value), name
        assert found["metrics"] == without["metrics"]


def saved(folder) -> None:
    trainer = EMDTrainer(*points({"parallel": "fsdp", "offload": ["teacher", "fake_score"], **STEP}))
    trainer.step()
    trainer.save(folder)


def resumed(folder) -> dict:
    network, settings = points({"parallel": "fsdp", "offload": ["fake_score"], "gather": "block", **STEP})
    trainer = EMDTrainer.resume(folder, network, config=settings)
    trainer.step()
    return {name: whole(value) for name, value in trainer._state.tensors().items()}


def straight() -> dict:
    trainer = EMDTrainer(*points({"parallel": "fsdp", **STEP}))
    trainer.step()
    trainer.step()
    return {name: whole(value) for name, value in trainer._state.tensors().items()}


def test_a_run_resumes_with_other_networks_in_host_memory_bit_for_bit(ranks, tmp_path):
    ranks(2, saved, tmp_path / "checkpoint")
    for found, expected in zip(ranks(2, resumed, tmp_path / "checkpoint"), ranks(2, straight), strict=True):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def wrapped_as_on_a_gpu() -> None:
    trainer = EMDTrainer(*points({"parallel": "fsdp", "offload": ["fake_score"]}))
    trainable = trainer.learners["fake_score"].trainable
    index = next(i for i, p in enumerate(trainable.whole) if hasattr(p, "device_mesh"))
    state = torch.ones_like(trainable.parameters[index])
    with unittest.mock.patch.object(DeviceMesh, "device_type", "cuda"):
        found = trainable.like(index, state)
        held = rows.held(found)  # as a checkpoint reads and writes it
    assert held.values.data_ptr() == state.data_ptr()
    assert found.shape == trainable.whole[index].shape and found.device.type == "cpu"
    assert distributed.local(found).data_ptr() == state.data_ptr()  # what is read into it reaches the optimizer


def test_state_in_host_memory_is_wrapped_where_it_is(ranks):
    ranks(2, wrapped_as_on_a_gpu)


def test_host_memory_is_pinned_for_a_gpu_alone():
    assert distributed.offload_policy(False, torch.device("cuda")) is None
    assert distributed.offload_policy(True, torch.device("cuda")).pin_memory
    assert not distributed.offload_policy(True, torch.device("cpu")).pin_memory


def held(changes) -> dict:
    trainer = EMDTrainer(even_teacher(), even_settings(parallel="fsdp", **changes))
    trainer.step()
    learner = trainer.learners["fake_score"]

    def size(tensors):
        return sum(distributed.local(tensor).nbytes for tensor in tensors)

    moments = (v for state in learner.optimizer.state.values() for key, v in state.items() if key != "step")
    return {
        "weights": size([*trainer.teacher.parameters(), *trainer.fake_score.parameters()]),
        "gradients": size(p.grad for p in trainer.fake_score.parameters()),
        "optimizer": size(moments),
    }


def test_the_plan_counts_what_is_in_host_memory(ranks):
    settings = even_settings(parallel="fsdp", offload=["teacher", "fake_score"])
    network = even_teacher()
    counts = ParameterCounts.of(network, network, network)
    planned = offloaded(counts, settings, "fsdp", 2, reduced=False)
    for found in ranks(2, held, {"offload": ["teacher", "fake_score"]}):
        assert found == pytest.approx(planned, rel=1e-6)
    made, without = (plan(counts, even_settings(parallel="fsdp", offload=o), devices=2) for o in (["teacher"], []))
    assert made.chosen.host == pytest.approx(without.chosen.total - made.chosen.total) and made.chosen.host > 0
    assert "the host, for a device" in made.table() and "the host" not in without.table()
    assert plan(counts, settings, devices=1).chosen.host == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"offload": ["teacher", "teacher"]}, "offload must name each network once"),
        ({"offload": ["generator"]}, "offload must be"),
        (
            {"offload": ["fake_score"], "adapter_rank": 2},
            "offload must leave .* out where it has an adapter",
        ),
        ({"offload": ["fake_score"], "optimizer_name": "apex_adamw"}, "has no step on the CPU"),
    ],
)
def test_what_cannot_be_offloaded_is_refused_in_the_configuration(changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        config(**changes)
    assert "\n" not in str(error.value)


def replicated() -> str:
    with pytest.raises(ConfigError) as error:
        EMDTrainer(points_teacher(), config(offload=["teacher"]))
    return str(error.value)


def test_whole_networks_on_every_rank_are_not_offloaded_in_silence(ranks):
    for said in ranks(2, replicated):
        assert said.startswith("offload must be empty where every rank holds whole networks, got ['teacher']")
    EMDTrainer(points_teacher(), config(offload=["teacher"]))  # one process has no shards, and may read such a run
