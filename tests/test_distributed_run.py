"""Resumed on other ranks, stopped by signals, killed: what a run on a cluster must live through."""

import contextlib
import dataclasses
import io
import math
import os
import random
import re
import resource
import signal
import socket
import time

import pytest
import test_run
import torch
import torch.distributed as dist
from spawned import Command, ended, wait_for
from test_distributed import config, teacher, whole

from emd_fast import EMDTrainer, distributed
from emd_fast import config as configuration
from emd_fast.cli import commands
from emd_fast.reporting import journal
from emd_fast.run import distill
from emd_fast.train import checkpoint, run_checkpoints
from emd_fast.train.checkpoint import CheckpointError


def state_of(trainer) -> dict[str, torch.Tensor]:
    parts = {"generator": trainer.generator, "fake_score": trainer.fake_score, "ema": trainer.ema.module}
    state = {f"{part}.{key}": whole(v) for part, module in parts.items() for key, v in module.state_dict().items()}
    for name, learner in trainer.learners.items():
        for index, parameter in enumerate(learner.trainable.parameters):
            for key, value in learner.optimizer.state[parameter].items():
                state[f"{name}_optimizer.{index}.{key}"] = whole(learner.trainable.like(index, value))
    return state


def train(settings, steps, start=None, end=None, background=False):
    """`steps` steps from a checkpoint or the beginning, saved at the end where asked; what is there then."""
    network = teacher(gain=True)
    trainer = EMDTrainer.resume(start, network, config=settings) if start else EMDTrainer(network, settings)
    for _ in range(steps):
        trainer.step()
    if end:
        trainer.save(end, background=background)
        trainer.finish_saving()
    return trainer.steps_done, state_of(trainer)


def assert_equal(mine, its):
    assert mine.keys() == its.keys()
    for key, value in its.items():
        assert torch.equal(mine[key], value), key


def assert_close(mine, its):
    assert mine.keys() == its.keys()
    for key, value in its.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
def test_n_steps_and_n_more_are_two_n_bit_for_bit_on_the_same_ranks(ranks, tmp_path, mode):
    settings = config(parallel=mode)
    ranks(2, train, settings, 2, None, tmp_path / "half", True)
    legs = ranks(2, train, settings, 2, tmp_path / "half")
    whole_runs = ranks(2, train, settings, 4)
    for (steps, mine), (_, its) in zip(legs, whole_runs, strict=True):
        assert steps == 4
        assert_equal(mine, its)
    assert_equal(legs[0][1], legs[1][1])


ONE, TWO, THREE = (1, "auto"), (2, "fsdp"), (3, "fsdp")


@pytest.mark.parametrize(("before", "after"), [(TWO, ONE), (ONE, THREE), (TWO, THREE), ((2, "replicate"), TWO)])
def test_a_run_goes_on_on_other_ranks(ranks, tmp_path, before, after):
    def on(place, *arguments):
        world, mode = place
        settings = config(parallel=mode, optimizer_name="adamw")
        return [train(settings, *arguments)] if world == 1 else ranks(world, train, settings, *arguments)

    saved = on(before, 2, None, tmp_path / "half")[0][1]
    # What is read is what was written, bit for bit; what is trained then agrees to rounding.
    for _, restored in on(after, 0, tmp_path / "half"):
        assert_equal(restored, saved)
    _, expected = train(config(), 4)
    for steps, mine in on(after, 2, tmp_path / "half"):
        assert steps == 4
        assert_close(mine, expected)


def diverging(folder, mode) -> tuple[int, list[bool], str]:
    """A run with NaN on one rank from the third step on: exit code, was nothing changed by each step, what was said."""
    generator_loss, update, unchanged, said = EMDTrainer._generator_loss, EMDTrainer._update, [], io.StringIO()

    def poisoned(self, posteriors):
        if self.steps_done >= 2 and distributed.rank() == 1:
            posteriors = [dataclasses.replace(each, drift=each.drift * math.nan) for each in posteriors]
        return generator_loss(self, posteriors)

    def watched(self, name):
        if name != "generator" or self.steps_done < 2:
            return update(self, name)
        moments = [v for state in self.learners["generator"].optimizer.state.values() for v in state.values()]
        held = [*map(distributed.local, self.generator.parameters()), *moments]
        before = [tensor.detach().clone() for tensor in held]
        norm = update(self, name)
        unchanged.append(all(torch.equal(a, b) for a, b in zip(held, before, strict=True)))
        return norm

    EMDTrainer._generator_loss, EMDTrainer._update = poisoned, watched
    try:
        with contextlib.redirect_stderr(said):
            code = commands.main(command(folder, parallel=mode, max_skipped=3, log_every=1))
    finally:
        EMDTrainer._generator_loss, EMDTrainer._update = generator_loss, update
    return code, unchanged, said.getvalue()


@pytest.mark.parametrize(("world", "mode"), [(2, "replicate"), (2, "fsdp"), (3, "replicate"), (3, "fsdp")])
def test_a_rank_whose_gradient_is_not_finite_stops_all_and_no_weight_has_moved(ranks, tmp_path, world, mode):
    results = ranks(world, diverging, tmp_path, mode)
    line = "not finite is that of first.weight of the generator"
    for rank, (code, unchanged, said) in enumerate(results):
        assert code == 1 and unchanged == [True] * 4
        assert [line in it for it in said.splitlines() if it.startswith("emd-fast:")] == [True] * (rank == 0), said
    assert [row["skipped"] for row in journal.read(tmp_path / "log.jsonl")] == [0, 0, 1, 2, 3, 4]
    assert line in (tmp_path / "report.md").read_text()


def damaged(path) -> str:
    with pytest.raises(CheckpointError) as error:
        EMDTrainer.resume(path, teacher(gain=True))
    return str(error.value)


def test_damage_that_one_rank_finds_is_told_to_all(ranks, tmp_path):
    path = tmp_path / "x"
    ranks(2, train, config(), 1, None, path)
    file = path / "rank-00001.bin"
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 1
    file.write_bytes(contents)
    for said in ranks(2, damaged, path):
        assert "x is truncated, damaged" in said and "rank-00001.bin" in said


def cannot_write(folder) -> str:
    trainer = EMDTrainer(teacher(), config())
    trainer.step()
    if distributed.rank() == 1:  # the disk of one machine

        def full(*_):
            raise OSError(28, "No space left on device")

        os.fsync, original = full, os.fsync
    try:
        with pytest.raises(CheckpointError) as error:
            trainer.save(folder / "x")
    finally:
        if distributed.rank() == 1:
            os.fsync = original
    return str(error.value)


def test_a_full_disk_on_one_rank_is_an_error_on_all(ranks, tmp_path):
    for said in ranks(2, cannot_write, tmp_path):
        assert "cannot write the checkpoint" in said and "No space left" in said
    assert not (tmp_path / "x").exists()


TINY = {key: value for key, value in test_run.TINY.items() if key not in ("emd.steps", "save_every")}


def command(folder, **options) -> list[str]:
    words = ["distill", "gmm", "--out", str(folder)]
    for key, value in {**TINY, **options}.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words


def started(words, world=1, each=None, environment=None, port=0) -> list[Command]:
    """The ranks of one command; of `each` its own where they are to differ."""
    if world == 1:
        return [Command(words)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = port or free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), **(environment or {})}
    return [
        Command(each[rank] if each else words, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]


def weights(folder, step) -> dict[str, torch.Tensor]:
    return checkpoint.load(run_checkpoints.path_of(folder / "checkpoints", step))["generator"]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "run"
    words = command(folder, steps=100_000, save_every=5, parallel="fsdp")
    processes = started(words, 2)
    wait_for(lambda: run_checkpoints.found(folder / "checkpoints"), processes)
    processes[1].send_signal(signal.SIGTERM)
    results = ended(processes)
    assert [code for code, _ in results] == [143, 143], results
    stopped = int(re.search(r"stopped at step (\d+) of 100000, saved", results[0][1])[1])
    assert "2 ranks, fsdp" in results[0][1] and not results[1][1].count("stopped")  # the main rank alone speaks
    steps = stopped + 4
    words = command(folder, steps=steps, save_every=5, parallel="fsdp")
    results = ended(started(words, 2))
    assert [code for code, _ in results] == [0, 0], results
    assert f"resuming {folder} at step {stopped} of {steps}" in results[0][1]
    assert (folder / "report.md").exists() and (folder / "metrics.json").exists()
    again = distill.distill(configuration.load(str(folder / "config.toml")), folder)
    assert again["steps"] == steps
    # The same run in one process, to rounding that the steps have had time to spread.
    assert all(torch.isfinite(value).all() for value in weights(folder, steps).values())


def test_what_all_ranks_find_wrong_is_said_once(tmp_path):
    results = ended(started(command(tmp_path / "run", batch_size=1), 2))
    assert [code for code, _ in results] == [2, 2]
    line = "emd-fast: batch_size must be at least the number of devices, 2, got 1\n"
    assert [said.count(line) for _, said in results] == [1, 0], results


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["renamed", "full disk"])
def test_a_fault_that_rank_0_meets_stops_all_ranks_with_one_line(tmp_path, fault):
    folder = tmp_path / "run"
    processes = started(command(folder, steps=100_000, log_every=1, save_every=100_000), 2)
    wait_for((folder / "log.jsonl").exists, processes)
    if fault == "renamed":
        folder.rename(tmp_path / "moved")
        expected = rf"emd-fast: the run folder {folder} was renamed to .*/moved/checkpoints/step-\d+\n"
    else:
        resource.prlimit(processes[0].pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        expected = r"emd-fast: .* File too large: .*log\.jsonl'; training stopped at step \d+, saved as .*\n"
    results = ended(processes)
    assert [code for code, _ in results] == [1, 1], results
    assert len(re.findall(expected, results[0][1])) == 1, results
    assert [said.count("emd-fast: ") for _, said in results] == [1, 0] and "Traceback" not in str(results)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_the_next_attempt_of_torchrun_goes_on(tmp_path):
    folder = tmp_path / "run"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def attempt(number, steps):
        shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(number)}
        return started(command(folder, steps=steps, save_every=5), 2, environment=shared, port=store.port)

    processes = attempt(0, 100_000)
    wait_for(lambda: run_checkpoints.found(folder / "checkpoints"), processes)
    processes[1].kill()
    ((code, said),) = ended(processes[:1])
    assert code == 1 and "emd-fast: rank 0 has lost another rank" in said and "Traceback" not in said
    saved = newest(folder / "checkpoints")
    results = ended(attempt(1, saved + 2))
    assert [code for code, _ in results] == [0, 0], results
    assert f"resuming {folder} at step {saved} of" in results[0][1]


def survives_being_killed(folder, seed, kills):
    chance = random.Random(seed)
    words, checkpoints = command(folder / "killed", steps=100_000, save_every=1), folder / "killed" / "checkpoints"
    last = 0
    for _ in range(kills):
        (process,) = started(words)
        # After a new checkpoint, so that every leg gets somewhere; then at any moment of the next few.
        wait_for(lambda last=last: newest(checkpoints) > last, [process])
        time.sleep(chance.uniform(0, 0.2))
        seen = newest(checkpoints)
        process.kill()
        check_leg(process, last)
        # A checkpoint that could be seen is not lost by the kill.
        last = newest(checkpoints)
        assert last >= seen
    steps = last + 3
    (process,) = started(command(folder / "killed", steps=steps, save_every=1))
    assert ended([process])[0][0] == 0, process.said()
    check_leg(process, last)
    distill.distill(configuration.load("gmm", {**TINY, "emd.steps": steps, "save_every": steps}), folder / "whole")
    mine, its = weights(folder / "killed", steps), weights(folder / "whole", steps)
    assert all(torch.equal(mine[key], its[key]) for key in its)
    assert not list(checkpoints.glob(".*"))


def check_leg(process, last):
    """It went on from the last checkpoint that was there."""
    assert "skipped" not in process.said(), process.said()
    if last:
        assert f" at step {last} of " in process.said(), process.said()


def newest(checkpoints) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run_checkpoints.found(checkpoints)), default=0)


@pytest.mark.slow
def test_a_run_that_is_killed_loses_only_the_steps_since_its_last_checkpoint(tmp_path):
    survives_being_killed(tmp_path, seed=0, kills=3)


@pytest.mark.exhaustive
def test_a_run_that_is_killed_twenty_times(tmp_path):
    survives_being_killed(tmp_path, seed=1, kills=20)
