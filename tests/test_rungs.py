"""Runs with several rungs: their times, the noise, the same step on any ranks, resume, replay and the plan."""

import copy
import importlib.util
import itertools
import json
import math

import pytest
import torch
from helpers import assert_same, assert_within, normals
from helpers import integers as plainly_drawn
from test_distributed import STEP, whole
from test_distributed import config as small
from test_distributed import teacher as points
from test_few_step import by_element
from test_trainer import config, digits_teacher, points_teacher

from emd_fast import Denoiser, EMDConfig, EMDTrainer, FewStepGenerator, OnRung
from emd_fast.config import ConfigError, load
from emd_fast.diffusion.schedules import EDM, VP, Cosine, RectifiedFlow
from emd_fast.export import export
from emd_fast.export import load as load_exported
from emd_fast.reporting import journal
from emd_fast.run import distill
from emd_fast.run.work import Work
from emd_fast.teachers.mlp import PointGenerator, TimeMLP
from emd_fast.train import rungs
from emd_fast.train.checkpoint import CheckpointError

BETAS = torch.linspace(1e-4, 0.02, 1000)


@pytest.mark.parametrize(
    ("schedule", "t_star"), [(EDM(), 2.0), (Cosine(), 0.7), (RectifiedFlow(), 1.0), (VP(BETAS), 600 / 999)], ids=repr
)
def test_rungs_are_uniform_in_log_snr_from_t_star_down(schedule, t_star):
    settings = EMDConfig(rungs=4, t_star=t_star)
    times = rungs.times_of(settings, schedule)
    log_snr = schedule.log_snr(torch.tensor(times)).tolist()
    # A t_star with more noise than is drawn stays the first rung, and the spacing begins where the draws do.
    log_snr[0] = max(log_snr[0], -2 * math.log(5.0))
    steps = [later - earlier for earlier, later in itertools.pairwise([*log_snr, -2 * math.log(0.05)])]
    assert times[0] == t_star and len(times) == 4
    # A chain has whole indices.
    assert steps == pytest.approx([steps[0]] * 4, rel=0.02 if isinstance(schedule, VP) else 1e-4)
    if isinstance(schedule, VP):
        assert all(abs(t * 999 - round(t * 999)) < 1e-3 for t in times)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rungs": 0}, "rungs must be at least 1, or falling times, got 0"),
        ({"rungs": []}, r"rungs must be at least 1, or falling times, got \[\]"),
        ({"rungs": [0.5, 2.0]}, r"rungs must fall from the highest noise level to the lowest, got \[0.5, 2.0\]"),
        ({"rungs": [2.0, 2.0]}, "rungs must fall"),
        ({"rungs": True}, "rungs must be int"),
        ({"rungs": [2.0, math.nan]}, "rungs must be"),
        ({"rungs": 8, "fake_score_warmup": 9000}, r"at most 2\^16"),
    ],
)
def test_rungs_that_cannot_be_are_refused_in_the_configuration(changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        EMDConfig(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "given", "said"),
    [
        ({"rungs": [2.0, -1.0]}, None, r"rungs = \[2.0, -1.0\] do not fit this teacher: t must be in \[0, inf\]"),
        ({"rungs": 3, "t_star": 0.04}, None, "rungs = 3 have no room between t_star = 0.04 and sigma / alpha = 0.05"),
        ({"rungs": 2}, PointGenerator(2, 8, 1, seed=0), "rungs must be 1, because the generator that was given takes"),
        ({}, FewStepGenerator(points_teacher(), (2.0, 0.5)), "rungs must be 2, because the generator that was given"),
        ({"rungs": [2.0, 0.4]}, FewStepGenerator(points_teacher(), (2.0, 0.5)), "rungs must be the times of the gen"),
    ],
)  # fmt: skip
def test_rungs_that_do_not_fit_are_refused_in_one_line(changes, given, said):
    with pytest.raises(ConfigError, match=said) as error:
        EMDTrainer(points_teacher(), config(**changes), given)
    assert "\n" not in str(error.value)


def test_the_first_rung_does_not_start_where_noise_is_divided_by_no_signal():
    schedule = VP(torch.linspace(1e-4, 0.04, 1000))
    network = Denoiser(TimeMLP(2, 8, 1, seed=1), schedule, "eps", sample_shape=(2,))
    with pytest.raises(ConfigError, match=r"t_star = 1 has alpha = .* take t_star up to"):
        EMDTrainer(network, config(rungs=2, t_star=1.0))
    EMDTrainer(network, config(rungs=2, t_star=0.6))


def test_a_generator_of_the_caller_may_have_rungs():
    generator = FewStepGenerator(copy.deepcopy(points_teacher()), (2.0, 0.5))
    trainer = EMDTrainer(points_teacher(), config(rungs=2), generator)
    trainer.step()
    assert trainer.generator is generator


@pytest.mark.parametrize("changes", [{}, {"guidance": 1.5}, {"sampling": "x_z"}, {"objective": "vsd"}])
def test_one_rung_is_the_run_without_rungs_bit_for_bit(changes):
    """A list of one time, a number and a generator of one rung give the step of today."""
    network, changes = digits_teacher(null_cond=0), {"num_classes": 3, **changes}
    trained = []
    one = FewStepGenerator(copy.deepcopy(network), [2.0])
    for settings, given in (
        (config(**changes), None),
        (config(rungs=[2.0], **changes), None),
        (config(**changes), one),
    ):
        trainer = EMDTrainer(network, settings, given)
        metrics = [trainer.step(), trainer.step()]
        trained.append((metrics, trainer.generator.state_dict(), trainer.generate(3)))
    for metrics, weights, samples in trained[1:]:
        assert metrics == trained[0][0] and torch.equal(samples, trained[0][2])
        assert all(torch.equal(value, weights[name]) for name, value in trained[0][1].items())


RUNGS = [2.0, 0.7, 0.2]


def test_the_noise_of_rungs_is_that_of_the_contract():
    trainer = EMDTrainer(points_teacher(), config(rungs=RUNGS, seed=3, fake_score_updates=2))
    where = {"seed": 3, "step": 5, "first_sample": 2}
    trainer.batches.at(5)
    for use in range(3):
        expected = plainly_drawn(3, (6,), stream=14, substep=use, **where).tolist()
        assert trainer.batches.rungs(2, 6, use).tolist() == expected
        for rung in range(2):
            found = trainer.batches.earlier_z(2, 6, use, rung)
            assert_within(found, normals((6, 2), stream=15, substep=3 * use + rung, **where), 1e-5)
    found = trainer.sample_posterior(step=5, samples=range(2, 8))
    assert found.cond.rung.tolist() == plainly_drawn(3, (6,), stream=14, **where).tolist()
    assert len(set(found.cond.rung.tolist())) > 1
    # Each number is drawn for one purpose.
    shown = [trainer.batches.shown_z(4, 0, j, (2,)) for j in range(3)]
    assert torch.equal(trainer.batches.shown(4)[0], shown[0])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(shown, 2))


class Alone(torch.nn.Module):
    """A network that computes every element alone, so that the batch around a sample cannot round it."""

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.9))

    def forward(self, x, t, cond):
        return self.gain * by_element(x, t, cond)


def test_the_rollout_of_a_step_makes_the_samples_of_sample(monkeypatch):
    """With the noise of the rollout as that of `generate`, and the same weights."""
    network = Denoiser.from_x0(Alone(), EDM(), sample_shape=(3,))
    trainer = EMDTrainer(network, config(rungs=[2.0, 0.7, 0.3, 0.1], num_classes=3, batch_size=12))
    trainer.step()
    found = trainer.sample_posterior()
    cond, step = found.cond, trainer.batches
    drawn = [step.earlier_z(0, 12, 0, i) for i in range(3)]
    monkeypatch.setattr(step, "shown_z", lambda n, first, rung, shape: drawn[rung])
    assert set(cond.rung.tolist()) == {0, 1, 2, 3}
    for j in range(1, 4):
        samples = trainer.generate(12, cond.cond, ema=False, calls=j)
        rows = cond.rung == j
        assert_same(cond.before[rows], samples[rows])
    assert not cond.before[cond.rung == 0].any()


def test_the_rollout_of_whole_batches_is_that_of_sample(monkeypatch):
    """A convolutional network rounds by batch: here all samples are on the last rung."""
    trainer = EMDTrainer(digits_teacher(), config(rungs=RUNGS, num_classes=3))
    monkeypatch.setattr(trainer.batches, "rungs", lambda first, size, use: torch.full((size,), 2))
    cond = trainer.sample_posterior().cond
    drawn = [trainer.batches.earlier_z(0, 8, 0, i) for i in range(2)]
    monkeypatch.setattr(trainer.batches, "shown_z", lambda n, first, rung, shape: drawn[rung])
    assert_same(cond.before, trainer.generate(8, cond.cond, ema=False, calls=2))


def test_calls_end_the_sampler_early_and_more_than_rungs_are_refused():
    trainer = EMDTrainer(points_teacher(), config(rungs=RUNGS))
    samples = [trainer.generate(4, calls=calls) for calls in (1, 2, 3)]
    assert_same(trainer.generate(4), samples[-1])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(samples, 2))
    for calls in (0, 4):
        with pytest.raises(ValueError, match=rf"calls must be in \[1, 3\], the rungs of this generator, got {calls}"):
            trainer.generate(4, calls=calls)
    with pytest.raises(ValueError, match=r"calls must be in \[1, 1\]"):
        EMDTrainer(points_teacher(), config()).generate(4, calls=2)


def test_every_rung_and_the_fake_score_train_on_the_rollout():
    """The fake score sees samples of all rungs, with other noise than the E-step; the generator gets no gradient."""
    trainer = EMDTrainer(points_teacher(), config(rungs=RUNGS, batch_size=32, fake_score_updates=2))
    seen, original = [], trainer.generator.forward

    def watched(z, cond=None):
        seen.append((cond.rung, torch.is_grad_enabled()))
        return original(z, cond)

    trainer.generator.forward = watched
    trainer.step()
    whole_batches = [rung for rung, _ in seen if len(rung) == 32]
    assert {tuple(rung.unique().tolist()) for rung in whole_batches} == {(0, 1, 2)}
    # Two updates of the fake score, and the E-step and M-step with one rung for each sample.
    assert len({tuple(rung.tolist()) for rung in whole_batches}) == 3
    # Passes of the rollout: rungs 0 and 1 for those above, three times, without gradient.
    parts = [(rung, grad) for rung, grad in seen if len(rung) < 32]
    assert [rung.unique().tolist() for rung, _ in parts] == [[0], [1]] * 3 and not any(grad for _, grad in parts)


def one_step(settings: EMDConfig) -> dict:
    trainer = EMDTrainer(points(1), settings)
    drawn, original = {}, trainer._e_step

    def watched(micro_batch):
        found = original(micro_batch)
        for i in range(len(found.t)):
            parts = (found.t, found.cond.rung, found.cond.cond, found.cond.before, found.z)
            drawn[micro_batch.first + i] = [part[i].clone() for part in parts]
        return found

    trainer._e_step = watched
    metrics = trainer.step() | trainer.diagnostics()
    return {
        "drawn": drawn,
        "gradients": {
            f"{name}.{key}": whole(value.grad)
            for name in ("generator", "fake_score")
            for key, value in getattr(trainer, name).named_parameters()
        },
        "metrics": {key: value.item() for key, value in metrics.items()},
        "shown": trainer.generate(3),
    }


def several(settings: list[EMDConfig]) -> list[dict]:
    return [one_step(each) for each in settings]


def assert_same_step(results, alone):
    drawn = {}
    for result in results:
        drawn |= result["drawn"]
    assert drawn.keys() == alone["drawn"].keys()
    for sample, parts in alone["drawn"].items():
        for part, expected in zip(drawn[sample][:3], parts[:3], strict=True):
            assert torch.equal(part, expected), sample
        for part, expected in zip(drawn[sample][3:], parts[3:], strict=True):
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-5)
    for result in results:
        for key, value in alone["gradients"].items():
            assert_within(result["gradients"][key], value, 1e-6 + 2e-5 * float(value.abs().max()), key)
        for key, value in alone["metrics"].items():
            assert result["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok=True), key
        torch.testing.assert_close(result["shown"], alone["shown"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_leave_the_step_as_it_is(micro):
    assert_same_step([one_step(small(rungs=3, micro_batch_size=micro, **STEP))], one_step(small(rungs=3, **STEP)))


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_the_same_step_on_any_number_of_ranks(ranks, world):
    settings = [
        small(rungs=3, parallel=mode, micro_batch_size=micro, **STEP)
        for mode, micro in itertools.product(("replicate", "fsdp"), (1, 4))
    ]
    results, alone = ranks(world, several, settings), one_step(small(rungs=3, **STEP))
    for index in range(len(settings)):
        assert_same_step([each[index] for each in results], alone)


def test_a_resumed_run_goes_on_bit_for_bit_and_one_rung_is_not_resumed_with_four(tmp_path):
    network, settings = points_teacher(), config(rungs=4, num_classes=0)
    trainer = EMDTrainer(network, settings)
    trainer.step()
    trainer.save(tmp_path / "x")
    resumed = EMDTrainer.resume(tmp_path / "x", network)
    assert resumed.generator.times == trainer.generator.times
    assert trainer.step() == resumed.step() and torch.equal(trainer.generate(3), resumed.generate(3))
    EMDTrainer(network, config()).save(tmp_path / "one")
    with pytest.raises(
        CheckpointError, match="was made with rungs = 1, not 4; another run needs another folder"
    ) as error:
        EMDTrainer.resume(tmp_path / "one", network, config=config(rungs=4))
    assert "\n" not in str(error.value)


def test_a_sample_alone_is_that_sample_of_the_batch():
    trainer = EMDTrainer(digits_teacher(), config(rungs=3, num_classes=3))
    trainer.step()
    batch = trainer.sample_posterior(step=7)
    for sample in (2, 5):
        alone = trainer.sample_posterior(step=7, samples=range(sample, sample + 1))
        for name in ("z", "eps", "drift"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(batch, name)[sample], rtol=1e-4, atol=1e-5)
        assert isinstance(alone.cond, OnRung) and alone.cond.rung[0] == batch.cond.rung[sample]
        torch.testing.assert_close(alone.cond.before[0], batch.cond.before[sample], rtol=1e-4, atol=1e-5)


def test_the_average_and_the_times_of_a_trainer_in_bfloat16():
    trainer = EMDTrainer(digits_teacher(), config(rungs=RUNGS, num_classes=3, precision="bfloat16"))
    trainer.step()
    assert trainer.ema.module.times == trainer.generator.times == tuple(torch.tensor(RUNGS).tolist())
    assert trainer.generate(2).dtype == torch.float32
    assert not torch.equal(trainer.generate(2), trainer.generate(2, ema=False))


def test_adapters_train_on_rungs_and_their_export_is_merged(tmp_path):
    pytest.importorskip("peft")
    trainer = EMDTrainer(digits_teacher(), config(rungs=3, num_classes=3, adapter_rank=2))
    before = trainer.generate(3, ema=False)
    trainer.step()
    assert not torch.equal(trainer.generate(3, ema=False), before)
    assert trainer.sample_posterior().cond.before.any()
    loaded = load_exported(export(trainer, tmp_path / "few.safetensors", "safetensors"))
    torch.testing.assert_close(loaded.sample(3, calls=2), trainer.generate(3, calls=2), rtol=1e-4, atol=1e-5)


def test_the_passes_of_the_rollout_are_planned():
    settings = config(rungs=4, fake_score_updates=2)
    work = Work(teacher=1.0, generator=10.0, fake_score=100.0)
    assert work.step(settings) - work.step(config(fake_score_updates=2)) == (2 + 1) * 3 / 2 * 10.0
    # As many as a step makes, on average over steps.
    trainer, samples = EMDTrainer(points_teacher(), config(rungs=4, fake_score_updates=2, batch_size=64)), []
    trainer.generator.register_forward_hook(lambda module, args, output: samples.append(len(args[0])))
    alone = EMDTrainer(points_teacher(), config(fake_score_updates=2, batch_size=64))
    alone.generator.register_forward_hook(lambda module, args, output: samples.append(-len(args[0])))
    for _ in range(10):
        trainer.step()
        alone.step()
    assert sum(samples) / 640 == pytest.approx((2 + 1) * 3 / 2, rel=0.05)


def test_the_fake_score_learns_the_rungs_apart():
    trainer = EMDTrainer(digits_teacher(), config(rungs=3, num_classes=3))
    embedding = trainer.fake_score.network.rung_embedding
    assert embedding.weight.shape[0] == 3 and not embedding.weight.any()
    trainer.step()
    assert embedding.weight.any(1).all()
    assert trainer.teacher.network.rung_embedding is trainer.generator.denoiser.network.rung_embedding is None
    one = EMDTrainer(digits_teacher(), config(num_classes=3))
    assert one.fake_score.network.rung_embedding is None
    # An adapter shares its base with the teacher, which knows no rung.
    if importlib.util.find_spec("peft"):
        adapted = EMDTrainer(digits_teacher(), config(rungs=3, num_classes=3, adapter_rank=2))
        assert adapted.fake_score.network.rung_embedding is None


def test_diagnostics_tell_the_rungs_apart():
    trainer = EMDTrainer(points_teacher(), config(rungs=3, batch_size=32, micro_batch_size=12))
    trainer.step()
    found = trainer.diagnostics()
    squares = torch.cat([record.posterior.drift.square().mean(1) for record in trainer._records])
    rung = torch.cat([record.posterior.cond.rung for record in trainer._records])
    for j in range(3):
        assert found[f"drift_rms_rung{j}"].item() == pytest.approx(squares[rung == j].mean().sqrt().item(), rel=1e-5)
    one = EMDTrainer(points_teacher(), config())
    one.step()
    assert not [name for name in one.diagnostics() if "rung" in name]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A run of digits with three rungs and an untrained teacher."""
    path = tmp_path_factory.mktemp("runs") / "few"
    tiny = {"teacher.steps": 1, "teacher.batch_size": 4, "teacher.channels": 8, "emd.steps": 2, "emd.batch_size": 4}
    distill.distill(load("digits", {**tiny, "emd.rungs": 3, "emd.langevin_steps": 1, "log_every": 1}), path)
    return path


@pytest.mark.slow
def test_a_run_evaluates_every_number_of_calls_and_samples_with_fewer(few, call, refused, tmp_path):
    metrics = json.loads((few / "metrics.json").read_text())
    assert metrics["frechet"].keys() == {"real", "teacher", "init", "generator_1", "generator_2", "generator"}
    report = (few / "report.md").read_text()
    for said in ("distilled generator (3 calls)", "distilled generator (1 call)", "before distillation (3 calls)"):
        assert said in report
    assert any("drift_rms_rung2" in row for row in journal.read(few / "log.jsonl"))
    _, _, trainer = distill.open_run(few)
    assert len(trainer.generator.times) == 3
    for calls in (1, 3):
        assert call("sample", few, "-n", 4, "--calls", calls, "--out", tmp_path / "x.pt")[0] == 0
        assert torch.equal(torch.load(tmp_path / "x.pt"), trainer.generate(4, calls=calls))
    refused(2, "calls must be in [1, 3], the rungs of this generator, got 4", "sample", few, "--calls=4", "--out=x.pt")
    assert call("export", few, tmp_path / "few.safetensors")[0] == 0
    assert call("sample", tmp_path / "few.safetensors", "-n", 4, "--calls", 2, "--out", tmp_path / "y.pt")[0] == 0
    assert torch.equal(torch.load(tmp_path / "y.pt"), trainer.generate(4, calls=2))
    refused(2, "calls must be in [1, 3]", "sample", tmp_path / "few.safetensors", "--calls=4", "--out=x.pt")
    assert "rung" in call("replay", few, "--step", 2, "--sample", 0, "--out", tmp_path / "replay")[1]


def test_wrong_rungs_are_refused_before_the_teacher_is_trained(refused, tmp_path):
    refused(2, "rungs must fall from the highest", "distill", "digits", "--out", "x", "--rungs", "[0.5, 2.0]")
    refused(2, "rungs = [2.0, -1.0] do not fit this teacher", "distill", "digits", "--out", "x", "--rungs", "[2, -1]")
    refused(2, "rungs must be 1, because the generator that was given", "distill", "gmm", "--out", "x", "--rungs", "2")
    assert not list((tmp_path / "x").glob("teacher*"))
