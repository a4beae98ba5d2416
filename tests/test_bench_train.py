"""benchmarks.train on the CPU: the rates it prints, its micro-batch, and what it does when time or memory is up."""

import functools
import json
import sys
import types

import diffusers_folders
import pytest
import torch

from benchmarks import networks, train
from benchmarks.harness import command, digest
from emd_fast import EMDTrainer
from emd_fast.train import throughput

SHORT = ["--device", "cpu", "--langevin-steps", "1", "--steps", "1"]


@pytest.fixture(autouse=True)
def small_product(monkeypatch):
    monkeypatch.setitem(train.ceiling._SIDE, "cpu", 32)


def test_a_network_is_trained_and_its_rates_are_printed_and_written(tmp_path, capsys, monkeypatch):
    words = ["small", "--device", "cpu", "--batch", "4", "--langevin-steps", "2", "--steps", "3"]
    seen = []
    step = EMDTrainer.step
    monkeypatch.setattr(EMDTrainer, "step", lambda self: seen.append(self) or step(self))
    assert train.main([*words, "--json", str(tmp_path / "x.json")]) == 0
    assert len(seen) == 4 and len(set(map(id, seen))) == 1
    *_, line = capsys.readouterr().out.splitlines()
    for said in ("small: 0.1 million", "bfloat16, fused, batch 4 by 4, K = 2", "3 steps,", "images/s", "MFU", "E "):
        assert said in line, said
    facts = json.loads((tmp_path / "x.json").read_text())
    assert {"hardware", "software", "clocks", "commit", "settings", "when"} < facts.keys()
    (one,) = train.read(tmp_path / "x.json")
    assert one.steps == one.wanted == 3 and one.skipped == 0 and one.why is None
    assert one.images_per_second == pytest.approx(4 / one.seconds)
    assert one.mfu == pytest.approx(one.flops / one.seconds / facts["matmul_flops_per_second"])
    # Operations: those of another step of the same trainer.
    monkeypatch.undo()
    assert one.flops == throughput.counted(seen[0].step)[1]
    assert digest.main([str(tmp_path / "x.json")]) == 0 and capsys.readouterr().out.strip() == line


def test_a_network_that_takes_text(monkeypatch, capsys):
    pytest.importorskip("diffusers")

    def made():
        return networks._Sample(diffusers_folders.text_unet())

    monkeypatch.setitem(train.NETWORKS, "sd15", networks.NetworkSpec(made, (4, 8, 8), text=(5, 8)))
    assert train.main(["sd15", *SHORT, "--batch", "2"]) == 0
    assert "million parameters, bfloat16, fused, batch 2 by 2, K = 1" in capsys.readouterr().out


def test_without_diffusers_the_others_are_trained_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert train.main(["sd15", "small", *SHORT, "--batch", "2"]) == 1
    said = capsys.readouterr().out
    assert "sd15: not trained: sd15 needs diffusers" in said and "small: 0.1 million" in said


def test_steps_end_when_the_time_is_up(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(train.time, "monotonic", lambda: float(next(clock)))
    trainer = types.SimpleNamespace(
        device=torch.device("cpu"),
        step=lambda: {"generator_loss": torch.ones(()), "fake_score_loss": torch.ones(())},
        timer=types.SimpleNamespace(seconds=lambda: {"fake_score": 0.25, "e_step": 0.5}),
    )
    seconds, parts = train._steps("x", trainer, 100, deadline=20.0)
    assert 5 < len(seconds) < 20 and parts == {"fake_score": len(seconds) / 4, "e_step": len(seconds) / 2}
    one = train.TrainingResult("x", steps=len(seconds), wanted=100)
    assert f"{len(seconds)} steps (the time was up; 100 were asked for)" in one.line()


def test_a_network_that_came_too_late_says_so(capsys):
    assert train.main(["small", *SHORT, "--batch", "2", "--seconds", "0"]) == 1
    assert "not trained: the time was up before its first timed step" in capsys.readouterr().out


def test_the_micro_batch_is_the_largest_that_there_is_room_for(monkeypatch):
    asked = types.SimpleNamespace(batch=16, micro_batch=0, steps=1, langevin_steps=1, fuse=True)
    kind, cpu = train.NETWORKS["small"], torch.device("cpu")
    teacher = networks.denoiser(kind, 0, cpu)
    each = train.activations(teacher, kind, cpu)
    # At least what the convolutions keep of their inputs in bfloat16: a pass of this network has some 20 of them.
    assert 20 * 16 * 8 * 8 * 2 < each < 200 * 64 * 8 * 8 * 4
    planned = functools.partial(train._configured, "small", kind, teacher, device=cpu)
    config, alone = planned(1, asked)
    assert config.compute.micro_batch_size == 1
    for room, size in ((alone, 1), (alone + 3.5 * each, 4), (alone + 100 * each, 16)):
        monkeypatch.setattr(train, "available", lambda device, room=room: room / train._MEMORY_SHARE + 1)
        config, need = planned(0, asked)
        assert config.compute.micro_batch_size == size and need == pytest.approx(alone + (size - 1) * each)
    monkeypatch.setattr(train, "available", lambda device: alone)
    with pytest.raises(train.ConfigError, match="GiB a device"):
        planned(0, asked)


def test_a_micro_batch_that_is_too_large_after_all_is_halved(monkeypatch, capsys):
    step = EMDTrainer.step

    def full(self):
        if self.config.compute.micro_batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self)

    monkeypatch.setattr(EMDTrainer, "step", full)
    assert train.main(["small", *SHORT, "--batch", "8"]) == 0
    said = capsys.readouterr().out
    assert all(f"again with micro-batches of {n}" in said for n in (4, 2)) and "batch 8 by 2" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["small", "--device", "tpu"], "--device must be cpu, cuda or cuda:N"),
        (["small", "--device", "cpu", "--json", "no/such/folder/x.json"], "there is no folder"),
    ],
)
def test_a_wrong_word_is_one_line(words, said, capsys):
    assert train.main(words) == 2
    assert said in capsys.readouterr().err


def test_cuda_is_the_current_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert command.device_named("cuda") == command.device_named(None) == torch.device("cuda", 3)
