import contextlib
import copy
import dataclasses
import math
import warnings

import pytest
import torch

from emd_fast import Denoiser, EMDConfig, EMDTrainer, Generator, fuse, fusion_report, ops, schedules, teachers
from emd_fast.config import ConfigError
from emd_fast.noise import Noise
from emd_fast.teachers.mlp import PointGenerator, TimeMLP
from emd_fast.teachers.small_unet import SmallUNet
from emd_fast.train import checkpoint
from emd_fast.train.checkpoint import CheckpointError
from emd_fast.train.divergence import cause
from emd_fast.train.fingerprint import fingerprint, process_of
from emd_fast.train.health import Diverged, HealthCheck, culprit


def points_teacher(schedule=None, width=16) -> Denoiser:
    form = ("edm", 0.5) if schedule in (None, schedules.EDM()) else ("eps", None)
    network = TimeMLP(2, width, 1, seed=1)
    return Denoiser(network, schedule or schedules.EDM(), form[0], sigma_data=form[1], sample_shape=(2,))


def digits_teacher(channels=8, null_cond=None) -> Denoiser:
    network = SmallUNet(1, channels, num_classes=3)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(1, 8, 8), null_cond=null_cond)


def config(**changes) -> EMDConfig:
    return EMDConfig(**{"steps": 4, "batch_size": 8, "langevin_steps": 2, **changes})


def states(trainer: EMDTrainer) -> dict[str, torch.Tensor]:
    flat = {}
    for name in ("generator", "fake_score"):
        flat |= {f"{name}.{key}": value for key, value in getattr(trainer, name).state_dict().items()}
    return flat | {f"ema.{key}": value for key, value in trainer.ema.module.state_dict().items()}


def assert_same_state(a: EMDTrainer, b: EMDTrainer) -> None:
    first, second = states(a), states(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_the_metrics_are_the_ones_promised():
    metrics = EMDTrainer(points_teacher(), config()).step()
    promised = "generator_loss fake_score_loss drift_rms z_rms generator_grad_norm fake_score_grad_norm skipped"
    assert set(metrics) == {*promised.split(), "generator_clipped", "fake_score_clipped"}
    assert all(value.dim() == 0 and math.isfinite(value.item()) for value in metrics.values())


def test_teacher_stays_and_generator_and_fake_score_move():
    teacher = digits_teacher()
    before = copy.deepcopy(teacher.state_dict())
    trainer = EMDTrainer(teacher, config(num_classes=3))
    started = copy.deepcopy(states(trainer))
    trainer.step()
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())
    moved = {key for key, value in states(trainer).items() if not torch.equal(started[key], value)}
    assert {key.split(".")[0] for key in moved} == {"generator", "fake_score", "ema"}


def the_networks(trainer: EMDTrainer) -> list[torch.nn.Module]:
    return [trainer.teacher, trainer.generator, trainer.fake_score, trainer.ema.module]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_networks_are_fused_and_the_step_is_the_same(precision):
    settings = config(num_classes=3, precision=precision, gamma_z=0.001)
    plain, fused = (EMDTrainer(digits_teacher(), dataclasses.replace(settings, fuse=on)) for on in (False, True))
    assert not any(fusion_report(network).fused for network in the_networks(plain))
    for network in the_networks(fused):
        report = fusion_report(network)
        assert {part.name for part in report.fused} >= {"ResidualBlock", "SelfAttention", "GroupNorm"}
        assert len(report.fused) == 20 and not report.left
    assert states(plain).keys() == states(fused).keys()
    metrics = [{key: value.item() for key, value in trainer.step().items()} for trainer in (plain, fused)]
    for key, value in metrics[0].items():
        assert metrics[1][key] == pytest.approx(value, rel=1e-4 if precision == "float32" else 0.05), key
    assert {p.dtype for p in fused.generator.parameters()} == {fused.generate(2).dtype} == {torch.float32}


def test_a_network_that_nothing_is_known_of_is_left_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fusion_report(EMDTrainer(points_teacher(), config()).teacher).fused


def test_a_network_that_fuse_refuses_wants_fuse_to_be_off():
    teacher = digits_teacher(132)  # one head of 264 dimensions
    with pytest.raises(ConfigError, match=r"fuse must be False for this network: .*256"):
        EMDTrainer(teacher, config(num_classes=3))
    EMDTrainer(teacher, config(num_classes=3, fuse=False))
    good = digits_teacher()
    with pytest.raises(ConfigError):
        EMDTrainer(good, config(num_classes=3), fake_score=teacher)
    assert not fusion_report(good).fused


def test_a_teacher_that_came_fused_is_compiled():
    trainer = EMDTrainer(fuse(digits_teacher()), config(num_classes=3, compile=True))
    assert all("compiled" in str(fusion_report(network)) for network in the_networks(trainer))


@pytest.mark.slow
def test_compiled_blocks_train():
    torch.compiler.reset()
    plain, compiled = (EMDTrainer(digits_teacher(), config(num_classes=3, compile=on)) for on in (False, True))
    assert all("compiled" in str(fusion_report(network)) for network in the_networks(compiled))
    metrics = [{key: value.item() for key, value in trainer.step().items()} for trainer in (plain, compiled)]
    assert metrics[1] == pytest.approx(metrics[0], rel=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "changes",
    [{"seed": 3}, {"guidance": 1.5}, {"sampling": "x_z", "gamma_z": [[0.1, 0.001], [1.0, 0.01]]}, {"objective": "vsd"}],
)
def test_n_steps_and_n_more_are_two_n_bit_for_bit(tmp_path, changes):
    teacher = digits_teacher(null_cond=0)
    if "seed" in changes:  # as fuse() lays weights out on a GPU; the optimizer's state lies beside them
        fuse(teacher, memory_format=torch.channels_last)
    settings = config(num_classes=3, lr_warmup=3, fake_score_warmup=2, **changes)
    whole, half = EMDTrainer(teacher, settings), EMDTrainer(teacher, settings)
    for trainer in (whole, whole, half, half):
        trainer.step()
    half.save(tmp_path / "half.pt")
    resumed = EMDTrainer.resume(tmp_path / "half.pt", teacher)
    assert resumed.steps_done == 2 and resumed.config == settings
    for trainer in (whole, whole, resumed, resumed):
        trainer.step()
    assert_same_state(whole, resumed)


def test_vsd_and_emd_of_one_step_give_the_same_direction_on_the_same_noise():
    # Statement 1 of the algorithm, through the trainer: the gradients differ by the factor gamma_eps alone.
    teacher = points_teacher()
    settings = config(langevin_steps=1, gamma_z=0.0, gamma_eps=0.25, grad_clip=0.0, fake_score_updates=1)
    gradients = []
    for objective in ("emd", "vsd"):
        trainer = EMDTrainer(teacher, dataclasses.replace(settings, objective=objective))
        trainer.step()
        gradients.append([parameter.grad for parameter in trainer.generator.parameters()])
    for emd, vsd in zip(*gradients, strict=True):
        torch.testing.assert_close(emd, 0.25 * vsd, rtol=1e-4, atol=1e-8)
    assert any(bool(gradient.abs().max() > 0) for gradient in gradients[0])


@pytest.mark.parametrize("cancel", [True, False])
def test_the_m_step_regresses_on_drift_or_without_cancellation_on_eps(cancel):
    trainer = EMDTrainer(points_teacher(), config(noise_cancellation=cancel, weighting="one"))
    trainer.step()
    sampled = trainer.sample_posterior()
    residual = sampled.drift if cancel else sampled.eps
    loss = trainer._generator_loss([sampled])
    assert loss.item() == pytest.approx(residual.square().mean().item() / 2, rel=1e-5)
    assert not torch.equal(sampled.drift, sampled.eps)


@pytest.mark.parametrize("network", ["generator", "fake_score"])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(network):
    trainer = EMDTrainer(points_teacher(), config())
    trainer.step()
    before = copy.deepcopy(states(trainer))
    module = getattr(trainer, network)
    optimizer = trainer.learners[network].optimizer
    moments = copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    sum((parameter * math.nan).sum() for parameter in module.parameters()).backward()
    trainer._update(network)
    assert culprit(trainer.learners) == f"{next(name for name, _ in module.named_parameters())} of the {network}"
    assert all(torch.equal(value, states(trainer)[key]) for key, value in before.items())
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments["state"][index][key]) for key, value in state.items())
    assert trainer.skipped.item() == 1
    assert trainer.step()["skipped"].item() == 1


def test_a_run_that_diverges_is_stopped():
    for z_rms, skipped, said in (
        ([1.0, 11.0, 1.0], 0, "RMS of z was 11"),  # whichever step is looked at
        ([1.0, math.nan, math.inf], 11, "11 updates were skipped"),
        ([1.0, math.nan, math.inf], 10, None),
    ):
        health = HealthCheck(config(steps=100))
        worst = [health.note({"z_rms": torch.tensor(each)}) for each in z_rms][-1]
        numbers = {"skipped": skipped, "z_rms_max": worst["z_rms_max"].item()}
        with pytest.raises(Diverged, match=f"{said}.*because") if said else contextlib.nullcontext():
            health.check(numbers, lambda: "because")


@pytest.mark.parametrize("network", ["teacher", "fake score", "generator"])
@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_the_network_that_returns_bad_values_is_named(network, value):
    trainer = EMDTrainer(points_teacher(), config(fuse=False))
    broken = getattr(trainer, network.replace(" ", "_"))
    with torch.no_grad():
        next(p for name, p in reversed(list(broken.named_parameters())) if name.endswith("bias")).fill_(value)
    trainer.step()
    assert f"the {network} returned values" in cause(trainer)


def test_a_step_size_too_large_for_sigma_is_seen_in_z_rms():
    # Stable for about gamma_z < 2 sigma^2 / |J|^2, where the teacher's data hardly vary and the generator's do.
    network, low = TimeMLP(2, 32, 1, seed=0), {"low": 0.05, "high": 0.06}
    times = {"time_distribution": low, "fake_score_time_distribution": low}
    trainer = EMDTrainer(
        teachers.gaussian(torch.zeros(2), 1e-4 * torch.eye(2), schedules.EDM()),
        config(langevin_steps=16, gamma_z=0.5, fake_score_warmup=20, **times),
        PointGenerator(2, 32, 1, seed=0),
        Denoiser(network, schedules.EDM(), "edm", sigma_data=1.0, sample_shape=(2,)),
    )
    metrics = {key: value.item() for key, value in trainer.step().items()}
    assert not metrics["z_rms"] < trainer.config.max_z_rms
    assert cause(trainer).startswith("the Langevin chain of z diverges")


def test_step_sizes_by_sigma_are_interpolated():
    trainer = EMDTrainer(points_teacher(), config())
    t = torch.tensor([0.01, 0.1, math.sqrt(0.1), 1.0, 50.0])
    size = trainer.batches.step_size([(0.1, 0.001), (1.0, 0.1)], t)
    torch.testing.assert_close(size, torch.tensor([0.001, 0.001, 0.01, 0.1, 0.1]), rtol=1e-4, atol=0)
    assert trainer.batches.step_size(0.3, t) == 0.3
    torch.testing.assert_close(trainer.batches.step_size([(0.1, 0.02)], t), torch.full((5,), 0.02))


@pytest.mark.parametrize("schedule", [schedules.EDM(), schedules.Cosine(), schedules.RectifiedFlow()])
@pytest.mark.parametrize("kind", ["log_uniform", "log_normal", "karras"])
def test_times_lie_where_the_distribution_says(schedule, kind):
    teacher = Denoiser(TimeMLP(2, 16, 1, seed=1), schedule, "x0", sample_shape=(2,))
    times = {"kind": kind, "low": 0.1, "high": 2.0}
    trainer = EMDTrainer(teacher, config(t_star=0.5, batch_size=512, time_distribution=times))
    t = trainer.batches.times(trainer.config.time_distribution, 512, stream=6)
    ratio = torch.exp(-schedule.log_snr(t) / 2)
    assert 0.0999 < ratio.min() and ratio.max() < 2.001
    if kind == "log_uniform":
        middle = ratio.log().mean().item()
        expected, spread = math.log(0.1 * 2.0) / 2, math.log(20) / math.sqrt(12 * 512)
        assert abs(middle - expected) < 5 * spread


@pytest.mark.parametrize("given", [{"prompts": torch.arange(3)}, {}])
def test_a_posterior_sample_of_another_step_has_the_conditions_of_that_step(given):
    trainer = EMDTrainer(digits_teacher(), config(num_classes=0 if given else 3), **given)
    for step in (0, 5):
        expected = ops.integers(3, (8,), Noise(0, step=step), stream=8)
        assert torch.equal(trainer.sample_posterior(step=step).cond, expected)
    assert torch.equal(trainer.sample_posterior().cond, expected)  # where the noise stands


def test_generate_is_the_same_for_any_split():
    trainer = EMDTrainer(digits_teacher(), config(num_classes=3))
    whole = trainer.generate(6)
    parts = torch.cat([trainer.generate(2), trainer.generate(4, first_sample=2)])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert not torch.equal(trainer.generate(2, torch.tensor([0, 0])), trainer.generate(2, torch.tensor([2, 2])))


def test_the_average_follows_with_its_warm_up():
    trainer = EMDTrainer(points_teacher(), config(ema=0.9))
    started = copy.deepcopy(trainer.generator.state_dict())
    trainer.step()
    for key, average in trainer.ema.module.state_dict().items():
        now = trainer.generator.state_dict()[key]
        torch.testing.assert_close(average, 0.1 * started[key] + 0.9 * now, rtol=1e-5, atol=1e-7)


def spoiled(change) -> Denoiser:
    teacher = points_teacher()
    change(teacher.network)
    return teacher


TEACHER = points_teacher()
WITHOUT = teachers.gaussian(torch.zeros(2), torch.eye(2), schedules.EDM())
NAN = spoiled(lambda network: network.first.weight.data[0, 0].fill_(math.nan))


@pytest.mark.parametrize(
    ("teacher", "networks", "said"),
    [
        (NAN, {}, r"teacher's weights are not finite: network\.first\.weight"),
        (WITHOUT, {}, "give EMDTrainer a generator and a fake score"),
        (TEACHER, {"generator": Generator(TEACHER, 2.0)}, "teacher and generator share parameters"),
        (TEACHER, {"fake_score": TEACHER}, "teacher and fake_score share parameters"),
        (TEACHER, {"fake_score": WITHOUT}, "no parameters to train"),
    ],
)
def test_networks_that_cannot_be_trained_are_named(teacher, networks, said):
    with pytest.raises(ValueError, match=said):
        EMDTrainer(teacher, config(), **networks)


def test_an_output_of_another_shape_and_labels_out_of_range_are_named():
    wide = EMDTrainer(spoiled(lambda network: setattr(network, "last", torch.nn.Linear(16, 4))), config())
    with pytest.raises(ValueError, match=r"returned shape \(8, 4\) for an input of shape \(8, 2\)"):
        wide.step()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\)"):
        EMDTrainer(digits_teacher(), config(num_classes=3)).step(torch.full((8,), 7))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    teacher = points_teacher()
    path = tmp_path / "x.pt"
    EMDTrainer(teacher, config()).save(path)
    with pytest.raises(CheckpointError, match=r"gamma_eps = 0\.16, not 0\.2"):
        EMDTrainer.resume(path, teacher, config=config(gamma_eps=0.2))
    assert EMDTrainer.resume(path, teacher, config=config(steps=9)).config.steps == 9
    with pytest.raises(CheckpointError, match="does not fit this generator"):
        EMDTrainer.resume(path, points_teacher(width=24))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])  # bfloat16: the trainer's own teacher is a rounded copy
def test_a_checkpoint_names_its_teacher_and_refuses_another(tmp_path, precision):
    teacher = points_teacher()
    teacher.source = "/somewhere/teacher"
    path = tmp_path / "x"
    EMDTrainer(teacher, config(precision=precision)).save(path)
    kept = checkpoint.facts(path)["teacher"]
    assert kept == {
        "path": "/somewhere/teacher",
        "sha256": fingerprint(points_teacher()),
        "process": process_of(points_teacher()),
    }
    moved = points_teacher()  # the same weights from another place
    moved.source = "/elsewhere/teacher"
    EMDTrainer.resume(path, moved)
    moved.network.last.bias.data[0] += 1e-6
    said = rf"other weights \(/somewhere/teacher, SHA-256 {kept['sha256'][:12]}\) than this one \(/elsewhere"
    with pytest.raises(CheckpointError, match=said):
        EMDTrainer.resume(path, moved)
    EMDTrainer.resume(path, moved, trains=False)


@pytest.mark.parametrize("changed", ["schedule", "sigma_data", "c_noise", "what it states"])
def test_a_teacher_with_another_noise_process_is_refused(tmp_path, changed):
    def teacher(schedule=None, sigma_data=0.5, c_noise=None):
        options = {"sigma_data": sigma_data} if schedule is None else {}
        kind = "edm" if schedule is None else "eps"
        network = TimeMLP(2, 16, 1, seed=1)
        return Denoiser(network, schedule or schedules.EDM(), kind, c_noise=c_noise, sample_shape=(2,), **options)

    chain = [schedules.VP(torch.linspace(1e-4, end, 1000)) for end in (0.02, 0.021)]
    was, now = {
        "schedule": (teacher(chain[0]), teacher(chain[1])),
        "sigma_data": (teacher(), teacher(sigma_data=0.501)),
        "c_noise": (teacher(), teacher(c_noise=lambda t: 1.001 * torch.log(t) / 4)),
        "what it states": (teacher(), teacher()),
    }[changed]
    trainer = EMDTrainer(was, config(t_star=0.6))
    if changed == "what it states":
        trainer.teacher_facts["process"] = [[1.0] * 7, ["x"]]
    trainer.save(tmp_path / "x")
    if changed != "what it states":
        EMDTrainer.resume(tmp_path / "x", was, trains=False)
    for trains in (False, True):
        with pytest.raises(CheckpointError, match="made with another noise schedule or parametrization") as error:
            EMDTrainer.resume(tmp_path / "x", now, trains=trains)
        assert "\n" not in str(error.value)
