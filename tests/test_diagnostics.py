"""What is logged about a step: its values against float64, and that nobody waits for a device to get them."""

import contextlib
import copy
import functools
import math

import pytest
import test_run
import test_trainer
import torch
from helpers import HostReads, normals
from PIL import Image
from test_trainer import assert_same_state, digits_teacher, points_teacher
from torch import nn

from emd_fast import Denoiser, EMDTrainer, ops, schedules
from emd_fast import config as settings
from emd_fast.config import TimeDistribution
from emd_fast.em.m_step import WEIGHTINGS
from emd_fast.noise import NoiseStream
from emd_fast.reporting import journal
from emd_fast.run import distill
from emd_fast.run import loop as training
from emd_fast.run.writes import FolderWrites
from emd_fast.train import diagnostics, throughput
from emd_fast.train.preview import denoised

config = functools.partial(test_trainer.config, batch_size=11, t_star=0.5)


def by_hand(trainer: EMDTrainer, sampled, generated) -> dict[str, float]:
    """The same statistics in float64, one sample after the other, from what the E-step returned and the M-step saw."""
    settings, step, batch = trainer.config, trainer.steps_done - 1, trainer.config.batch_size
    z, eps, drift, alpha, sigma = (getattr(sampled, x).double() for x in ("z", "eps", "drift", "alpha", "sigma"))
    z_0 = torch.as_tensor(normals(z.shape, seed=settings.seed, step=step, stream=NoiseStream.E_STEP_Z))
    eps_0 = torch.as_tensor(normals(eps.shape, seed=settings.seed, step=step, stream=NoiseStream.E_STEP_EPS))
    weight = WEIGHTINGS[settings.weighting](alpha, sigma)
    if settings.objective == "vsd":
        weight = weight / settings.gamma_eps
    scale = (weight * alpha / sigma)[:, None]
    x = generated.double()
    found = {
        "sample_mean": x.mean(),
        "sample_std": x.std(correction=0),
        "z_moved_rms": (z - z_0).square().mean().sqrt(),
        "eps_moved_rms": (eps - eps_0).square().mean().sqrt(),
        "signal_var_drift": (scale * drift).var(0, correction=0).mean(),
        "signal_var_eps": (scale * eps).var(0, correction=0).mean(),
    }
    low, high = settings.time_distribution.low, settings.time_distribution.high
    edges = torch.linspace(-2 * math.log(high), -2 * math.log(low), diagnostics.BINS + 1).tolist()
    for i in range(diagnostics.BINS):
        inside = [b for b in range(batch) if edges[i] <= 2 * math.log(alpha[b] / sigma[b]) < edges[i + 1]]
        mine = [drift[b].square().mean() for b in inside]
        found[f"drift_rms_bin{i}"] = (sum(mine) / len(mine)) ** 0.5 if mine else math.nan
    return {name: float(value) for name, value in found.items()}


def watched_step(trainer: EMDTrainer):
    """A step, with what its M-step had: the E-step of all samples and g(z_K), by another way than the trainer's own."""
    before = copy.deepcopy(trainer.generator)
    pieces, original = [], trainer._e_step
    trainer._e_step = lambda piece: pieces.append(original(piece)) or pieces[-1]
    trainer.step()
    del trainer._e_step
    parts = {name: torch.cat([getattr(p, name) for p in pieces]) for name in ("z", "eps", "drift", "alpha", "sigma")}
    with torch.no_grad():
        generated = before(parts["z"], None)
    return type("Sampled", (), parts), generated


STEPS = [
    {"seed": 3}, {"micro_batch_size": 4, "gamma_z": 0.0, "weighting": "sigma_over_alpha"},
    {"objective": "vsd", "gamma_eps": 0.25}, {"noise_cancellation": False, "batch_size": 3},
]  # fmt: skip


@pytest.mark.parametrize("changes", STEPS, ids=str)
@pytest.mark.parametrize("schedule", [schedules.EDM(), schedules.Cosine()], ids=repr)
def test_every_value_is_that_of_float64_by_hand(changes, schedule):
    trainer = EMDTrainer(points_teacher(schedule), config(**changes))
    for _ in range(2):
        sampled, generated = watched_step(trainer)
    found, expected = trainer.diagnostics(), by_hand(trainer, sampled, generated)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.shape == () and value.dtype == torch.float32, name
        # Normals are right to 5e-6, sums of float32 to some 1e-6 of their size.
        assert value.item() == pytest.approx(expected[name], rel=2e-5, abs=2e-5, nan_ok=True), name
    bins = [found[f"drift_rms_bin{i}"].item() for i in range(diagnostics.BINS)]
    assert any(map(math.isfinite, bins))
    if trainer.config.batch_size < diagnostics.BINS:
        assert any(map(math.isnan, bins))


def test_without_a_chain_of_eps_nothing_is_said_about_it():
    trainer = EMDTrainer(points_teacher(), config(objective="sid"))
    sampled, generated = watched_step(trainer)
    found, expected = trainer.diagnostics(), by_hand(trainer, sampled, generated)
    assert expected.keys() - found.keys() == {"z_moved_rms", "eps_moved_rms", "signal_var_eps"}
    for name, value in found.items():
        assert value.item() == pytest.approx(expected[name], rel=2e-5, abs=2e-5, nan_ok=True), name
    assert list(trainer.gradient_variance()) == ["generator_grad_var_drift"]


def test_the_bins_divide_the_range_in_which_t_is_drawn_as_far_as_the_schedule_goes():
    for (low, high), (first, last) in (((0.05, 5.0), (0.05, 5.0)), ((1e-6, 1e6), (0.002, 80))):
        start, width = diagnostics.log_snr_bins(schedules.EDM(), TimeDistribution(low=low, high=high))
        assert (start, 8 * width) == pytest.approx((-2 * math.log(last), 2 * math.log(last / first)), rel=1e-5)


def test_a_sample_that_is_not_finite_stays_in_its_bin():
    trainer = EMDTrainer(points_teacher(), config(batch_size=64))
    trainer.step()
    healthy = trainer.diagnostics()
    trainer._records[0].posterior.drift[0] = math.nan
    ill = trainer.diagnostics()
    changed = [name for name in healthy if "bin" in name and not torch.equal(healthy[name], ill[name])]
    assert len(changed) == 1 and ill[changed[0]].isnan()


def gradients_of_samples(trainer: EMDTrainer, target: str) -> torch.Tensor:
    """(B, parameters) float64: each sample's gradient at the weights as they are, by its own pass."""
    generator, rows = copy.deepcopy(trainer.generator).double(), []
    for record in trainer._records:
        for i in range(len(record.posterior.t)):
            posterior = record.posterior
            values = (posterior.z, getattr(posterior, target), posterior.alpha, posterior.sigma, record.weight)
            z, residual, alpha, sigma, weight = (x[i : i + 1].double() for x in values)
            generated = generator(z, None)
            regression = weight / (2 * sigma**2) * (alpha * (generated - generated.detach()) - sigma * residual) ** 2
            gradient = torch.autograd.grad(regression.mean(), list(generator.parameters()))
            rows.append(torch.cat([g.reshape(-1) for g in gradient]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "changes",
    [{}, {"batch_size": 8, "micro_batch_size": 3}, {"objective": "vsd"}, {"noise_cancellation": False}],
    ids=str,
)
def test_the_variance_of_the_gradient_is_that_of_halves_by_hand(changes):
    trainer = EMDTrainer(points_teacher(), config(**changes))
    trainer.step()
    found = trainer.gradient_variance()
    assert list(found) == ["generator_grad_var_drift", "generator_grad_var_eps"]
    for target in diagnostics.signals(trainer.config):
        each = gradients_of_samples(trainer, target)
        even, odd = each[::2], each[1::2]
        of_a_sample = (even.mean(0) - odd.mean(0)).square().sum() / (1 / len(even) + 1 / len(odd))
        value = found[f"generator_grad_var_{target}"]
        assert value.shape == () and value.item() == pytest.approx(float(of_a_sample / len(each)), rel=1e-4)


def test_one_sample_has_no_variance_and_before_a_step_there_are_no_diagnostics():
    trainer = EMDTrainer(points_teacher(), config(batch_size=1))
    for ask in (trainer.diagnostics, trainer.gradient_variance):
        with pytest.raises(RuntimeError, match="call step"):
            ask()
    trainer.step()
    assert all(value.isnan() for value in trainer.gradient_variance().values())


def test_looking_does_not_change_the_training():
    watched, alone = (EMDTrainer(digits_teacher(), config(num_classes=3, micro_batch_size=4)) for _ in range(2))
    for _ in range(3):
        said = watched.step()
        watched.diagnostics()
        watched.gradient_variance()
        assert all(torch.equal(value, said[name]) for name, value in alone.step().items())
    assert_same_state(alone, watched)


class Product(nn.Module):
    """x W, whatever the time: one matrix product a pass."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x, t, cond=None):
        return x @ self.weight


def test_operations_of_a_step_are_those_of_its_passes():
    teacher = Denoiser(Product(0), schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(6,))
    trainer = EMDTrainer(teacher, config(langevin_steps=3, fake_score_updates=2))
    metrics, operations = throughput.counted(trainer.step)
    # A fake-score update: two passes, and the weights' gradient. A Langevin step: three passes, and the gradient to z.
    # The M-step: a pass, and the weights' gradient.
    assert operations == (2 * 3 + 3 * 4 + 2) * 2 * 11 * 6 * 6
    same = EMDTrainer(teacher, config(langevin_steps=3, fake_score_updates=2)).step()
    assert all(torch.equal(value, metrics[name]) for name, value in same.items())


def test_operations_of_attention_are_counted():
    q, k, v = (torch.randn(2, tokens, 3, 4, requires_grad=True) for tokens in (5, 7, 7))
    out, forward = throughput.counted(lambda: ops.attention(q, k, v, backend="reference"))
    _, backward = throughput.counted(out.sum().backward)
    product = 2 * 2 * 3 * 5 * 7 * 4
    assert (forward, backward) == (2 * product, 5 * product)


def test_the_timer_has_the_parts_of_the_last_step(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 10.0, 12.0, 13.0])
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    timer = throughput.StepTimer(torch.device("cpu"))
    assert timer.seconds() == {} and throughput.shares({}) == {}
    for _ in range(2):
        timer.start()
        timer.end("a")
        timer.end("b")
    assert timer.seconds() == {"a": 2.0, "b": 1.0}
    assert throughput.shares(timer.seconds()) == {"a_share": pytest.approx(2 / 3), "b_share": pytest.approx(1 / 3)}


def test_memory_is_in_bytes():
    # A Python with torch: more than 50 MiB, less than this machine has.
    assert 50 * 2**20 < throughput.peak_memory(torch.device("cpu")) < 2**44


TINY = test_run.TINY | {"emd.steps": 7, "emd.fake_score_warmup": 1, "log_every": 3, "save_every": 100}


def test_no_value_is_asked_for_between_logged_steps(tmp_path, monkeypatch):
    asked, now, step, tolist = set(), [0], EMDTrainer.step, torch.Tensor.tolist
    reads = HostReads(lambda file: asked.add(now[0]))

    def counted_step(self, cond=None):
        now[0] = self.steps_done + 1
        return step(self, cond)

    def counted_tolist(self):  # reads the memory of a CPU tensor, past every dispatch
        reads.asked()
        return tolist(self)

    monkeypatch.setattr(EMDTrainer, "step", counted_step)
    monkeypatch.setattr(torch.Tensor, "tolist", counted_tolist)
    monkeypatch.setattr(distill, "evaluate", lambda *_: {})
    with reads:
        distill.distill(settings.load("gmm", {**TINY, "gradient_variance": True}), tmp_path)
    assert asked - {0} == {3, 6, 7}


def test_the_log_has_everything_and_the_line_says_the_most_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "evaluate", lambda *_: {})
    seen = []

    class Sink:
        module = staticmethod(lambda: None)
        __init__ = close = lambda *_: None
        write = lambda self, row: seen.append(row)  # noqa: E731

    monkeypatch.setitem(journal._SINKS, "tensorboard", Sink)
    extra = {"peak_tflops": 0.5, "gradient_variance": True}
    distill.distill(settings.load("gmm", {**TINY, **extra}), tmp_path, ("tensorboard",))
    rows = journal.read(tmp_path / "log.jsonl")
    assert rows == seen and [row["step"] for row in rows] == [3, 6, 7]
    for row in rows:
        assert all(map(math.isfinite, row.values()))
        assert 0 < row["generator_grad_var_drift"] < row["generator_grad_var_eps"]
        assert {"sample_mean", "signal_var_eps", "images_per_second", "eta_seconds", "memory_gib"} < row.keys()
        assert any(name.startswith("drift_rms_bin") for name in row)
        assert row["fake_score_share"] + row["e_step_share"] + row["m_step_share"] == pytest.approx(1)
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5)
    assert rows[-1]["eta_seconds"] == 0 and not (tmp_path / "samples" / "networks").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("distil 7/7")]
    for word in ("generator", "fake score", "drift", "images/s", "TFLOP/s", "MFU", "GiB", "E ", "M ", "F ", "s left"):
        assert word in line, word


def test_what_is_not_known_is_not_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "evaluate", lambda *_: {})
    distill.distill(settings.load("gmm", TINY), tmp_path / "no_peak")
    assert all("tflops" in row and "mfu" not in row for row in journal.read(tmp_path / "no_peak" / "log.jsonl"))
    graph = {"emd.compute.cuda_graph": True, "peak_tflops": 0.5}
    distill.distill(settings.load("gmm", TINY | graph), tmp_path / "graph")
    assert all("tflops" not in row and "mfu" not in row for row in journal.read(tmp_path / "graph" / "log.jsonl"))
    auto = {"emd.compute.cuda_graph": "auto", "peak_tflops": 0.5}
    capsys.readouterr()
    distill.distill(settings.load("gmm", TINY | auto), tmp_path / "auto")
    assert "cuda_graph is auto: off: cpu tensors have no graphs" in capsys.readouterr().err.splitlines()
    assert all("mfu" in row for row in journal.read(tmp_path / "auto" / "log.jsonl"))


def test_the_three_networks_denoise_the_same_images():
    trainer = EMDTrainer(digits_teacher(null_cond=0), config(num_classes=3, guidance=1.5))
    trainer.step()
    found = denoised(trainer, 4)
    assert list(found) == ["generator", "teacher", "fake_score"]
    x, cond = trainer.generate(4, ema=False), torch.tensor([0, 1, 2, 0])
    assert torch.equal(found["generator"], x)
    ratio = math.sqrt(0.05 * 5.0)
    eps = normals(x.shape, stream=NoiseStream.SHOWN, substep=1).float()
    t = torch.full((4,), ratio)
    with torch.no_grad():
        for name, guidance in (("teacher", 1.5), ("fake_score", None)):
            expected = getattr(trainer, name).denoise(x + ratio * eps, t, cond, guidance)
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(found["teacher"], found["fake_score"])


def test_a_picture_has_a_row_for_each_network_and_never_stops_a_run(tmp_path):
    trainer = EMDTrainer(digits_teacher(), config(num_classes=3))
    for name in ("checkpoints", "samples"):
        (tmp_path / name).mkdir()
    (tmp_path / "config.toml").touch()
    with contextlib.ExitStack() as held:
        writes = FolderWrites(tmp_path, held)
        training._show(trainer, tmp_path, writes)
        next(trainer.fake_score.parameters()).data.fill_(math.nan)
        training._show(trainer, tmp_path, writes)
    assert writes.failed is None
    with Image.open(tmp_path / "samples" / "networks" / "step-00000000.png") as picture:
        assert picture.width > 2 * picture.height
