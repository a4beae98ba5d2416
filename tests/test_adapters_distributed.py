"""Adapters on several ranks: the base is sharded and gathered once, the adapters are on every rank."""

import dataclasses
import itertools

import pytest
import torch
from helpers import assert_within
from test_distributed import STEP, config, points, teacher, whole
from test_distributed_group import counted

from emd_fast import EMDTrainer, distributed
from emd_fast.train.preview import denoised

pytest.importorskip("peft")
ADAPTERS = {"adapter_rank": 2, "adapter_targets": ["0", "first", "last"], **STEP}


def steps(settings, from_rank_0=False) -> dict:
    network = teacher(gain=True)
    if from_rank_0 and distributed.rank():
        network.to("meta")
    trainer = EMDTrainer(network, settings)
    metrics = [trainer.step() for _ in range(2)][-1] | trainer.diagnostics()
    assert all(p.grad is None for p in trainer.teacher.parameters())
    state = {name: whole(value) for name, value in trainer._state.tensors().items()}
    assert all(".lora_" in name for name in state)
    return {
        "state": state,
        "metrics": {key: value.item() for key, value in metrics.items()},
        "shown": torch.stack([trainer.generate(3), *denoised(trainer, 3).values()]),
        "sharded": [distributed.is_sharded(n) for n in (trainer.teacher, trainer.generator, trainer.ema.module)],
    }


def several(settings_of, from_rank_0) -> list[dict]:
    return [steps(settings, from_rank_0) for settings in settings_of]


@pytest.mark.parametrize("from_rank_0", [False, True])
@pytest.mark.slow
def test_the_same_steps_on_any_number_of_ranks(ranks, from_rank_0):
    modes = list(itertools.product(("replicate", "fsdp"), (2, 0)))
    settings = [config(parallel=mode, micro_batch_size=micro, **ADAPTERS) for mode, micro in modes]
    settings[-1] = dataclasses.replace(settings[-1], score_passes="joint")
    alone = steps(config(**ADAPTERS))
    for rank in ranks(2, several, settings, from_rank_0):
        for (mode, _), result in zip(modes, rank, strict=True):
            assert result["sharded"] == [mode == "fsdp"] * 3
            assert result["state"].keys() == alone["state"].keys()
            for key, value in alone["state"].items():
                assert_within(result["state"][key], value, 1e-6 + 1e-4 * float(value.abs().max()), key)
            for key, value in alone["metrics"].items():
                assert result["metrics"][key] == pytest.approx(value, rel=1e-3, abs=1e-7, nan_ok="bin" in key), key
            torch.testing.assert_close(result["shown"], alone["shown"], rtol=1e-4, atol=1e-5)


def collectives(changes) -> dict:
    trainer = EMDTrainer(*points({"parallel": "fsdp", "fake_score_warmup": 0, **changes}))
    trainer.step()

    def generator_update():
        with distributed.gathered(trainer.generator):
            trainer._generator_loss(trainer._e_steps(None))

    return {
        "generator update": counted(generator_update),
        "fake-score update": counted(lambda: trainer._fake_score_update(None, 0)),
    }


def test_the_base_is_gathered_once_and_no_gradient_of_it_is_reduced(ranks):
    """Four groups: three blocks and the rest. Whatever K, and one network where three would be gathered."""
    few, many = (ranks(2, collectives, {"langevin_steps": k, **ADAPTERS})[0] for k in (1, 8))
    assert few == many
    assert many["generator update"] == {"allgather_base": 4}
    assert many["fake-score update"] == {"allgather_base": 4, "allreduce": 1}


def saved(folder, mode) -> None:
    trainer = EMDTrainer(*points({"parallel": mode, **ADAPTERS}))
    trainer.step()
    trainer.save(folder)


def test_another_number_of_ranks_resumes_the_run(ranks, tmp_path):
    ranks(2, saved, tmp_path / "checkpoint", "fsdp")
    network, settings = points(ADAPTERS)
    again = EMDTrainer.resume(tmp_path / "checkpoint", network, config=settings)
    alone = EMDTrainer(*points(ADAPTERS))
    alone.step()
    for trainer in (again, alone):
        trainer.step()
    for (name, mine), its in zip(again._state.tensors().items(), alone._state.tensors().values(), strict=True):
        assert_within(mine, its, 1e-6 + 1e-4 * float(its.abs().max()), name)
