"""One frozen base with adapters against three networks: the same numbers, a fraction of the memory and of the files."""

import dataclasses
import sys

import diffusers_folders as folders
import pytest
import torch
from conftest import BACKENDS
from helpers import assert_within, randomised, seeded
from test_trainer import assert_same_state, config, digits_teacher, points_teacher
from torch import nn

from emd_fast import Denoiser, EMDConfig, EMDTrainer, Generator, schedules, use_backend
from emd_fast.config import ConfigError
from emd_fast.distributed import blocks_of
from emd_fast.teachers import diffusers as diffusers_teachers
from emd_fast.train import adapters, checkpoint
from emd_fast.train.checkpoint import CheckpointError

peft = pytest.importorskip("peft")
RANK = 64  # of every layer of the networks here
PREFIX = {"generator": "denoiser.", "fake_score": ""}


def adapted(teacher, **changes) -> EMDTrainer:
    return EMDTrainer(teacher, config(**{"adapter_rank": 4, **changes}))


def trained_names(network: nn.Module) -> list[str]:
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


def moved(denoiser: Denoiser, layers: list[str], seed: int) -> Denoiser:
    """Moves the weights of these layers by a third of their size."""
    g = seeded(seed)
    for name in layers:
        weight = denoiser.get_submodule(name).weight.data
        weight += 0.3 * weight.std().clamp(min=0.01) * torch.randn(weight.shape, generator=g)
    return denoiser


@torch.no_grad()
def factorise(layer: nn.Module, name: str, difference: torch.Tensor) -> None:
    """Sets B and A so that B A is a difference of two weights."""
    flat = difference.flatten(1)
    u, s, v = torch.linalg.svd(flat.double(), full_matrices=False)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    a.zero_(), b.zero_()
    a.flatten(1)[: len(s)] = (s.sqrt()[:, None] * v).float()
    b.flatten(1)[:, : len(s)] = (u * s.sqrt()).float()


TEACHERS = {"images": (digits_teacher, {"num_classes": 3}), "points": (points_teacher, {})}


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 3}, {"fuse": False, "sampling": "x_z"}])
def test_full_rank_adapters_are_three_networks(kind, changes):
    make, more = TEACHERS[kind]
    teacher, settings = make(), config(grad_clip=0.0, **more, **changes)
    layers = adapters.names_of(teacher, dataclasses.replace(settings, adapter_rank=RANK).adapter)
    apart = {"generator": moved(make(), layers, 1), "fake_score": moved(make(), layers, 2)}
    one = EMDTrainer(teacher, dataclasses.replace(settings, adapter_rank=RANK, adapter_alpha=RANK / 2))
    for role, other in apart.items():
        network = getattr(one, role)
        for name in layers:
            layer = network.get_submodule(PREFIX[role] + name)
            factorise(layer, role, 2 * (other.get_submodule(name).weight.detach() - layer.base_layer.weight))
    three = EMDTrainer(
        make(), settings, generator=Generator(apart["generator"], settings.t_star), fake_score=apart["fake_score"]
    )
    mine, its = (trainer.sample_posterior(step=0) for trainer in (one, three))
    for name in ("z", "eps", "drift"):
        exact = getattr(its, name)
        assert_within(getattr(mine, name), exact, 2e-5 * float(exact.abs().max()), name)
    assert its.drift.abs().max() > 1e-3
    for trainer in (one, three):
        for learner in trainer.learners.values():  # so that the weights stay those above
            learner.optimizer.step = lambda: None
        trainer.step()
    for role in apart:
        for name in layers:
            layer = getattr(one, role).get_submodule(PREFIX[role] + name)
            whole = getattr(three, role).get_submodule(PREFIX[role] + name).weight.grad.flatten(1)
            a, b = layer.lora_A[role].weight, layer.lora_B[role].weight
            by_a, by_b = 0.5 * b.detach().flatten(1).T @ whole, 0.5 * whole @ a.detach().flatten(1).T
            for found, exact in ((a.grad.flatten(1), by_a), (b.grad.flatten(1), by_b)):
                assert_within(found, exact, 1e-7 + 2e-4 * float(exact.abs().max()), f"{role} {name}")


# One pass rounds the rows of teacher and fake score alike only where the matrix products do.
ZERO = {("separate", "float32"): 0, ("separate", "bfloat16"): 0, ("joint", "float32"): 1e-4, ("joint", "bfloat16"): 0.1}


@pytest.mark.parametrize("passes", ["separate", "joint"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_delta_is_0_while_the_adapters_are(kind, backend, precision, passes):
    make, more = TEACHERS[kind]
    trainer = adapted(make(), precision=precision, gamma_z=0.05, score_passes=passes, **more)
    seen = []
    labels = torch.arange(8) % 3 if more else None  # not every backend draws integers
    with use_backend(backend):
        found = trainer.sample_posterior(labels, watch=lambda step: seen.append(step.delta.abs().max().item()))
    assert len(seen) == 2 and max(seen) <= ZERO[passes, precision]
    assert passes == "joint" or not found.drift.any()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("passes", ["separate", "joint"])
def test_delta_of_a_transformer_is_0_while_the_adapters_are(tmp_path, batch, passes):
    pytest.importorskip("diffusers")
    teacher = diffusers_teachers.load(folders.bare_sd3(tmp_path))
    settings = config(batch_size=batch, adapter_rank=4, score_passes=passes, t_star=1.0, input_scale=1.0)
    trainer = EMDTrainer(teacher, settings)
    assert all(".attn." in name for name in trained_names(trainer.fake_score))
    cond = {"prompt_embeds": torch.randn(batch, 3, 16), "pooled_projections": torch.randn(batch, 16)}
    seen = []
    trainer.sample_posterior(cond, watch=lambda step: seen.append(step.delta.abs().max().item()))
    assert len(seen) == 2 and max(seen) <= ZERO[passes, "float32"]


# One pass for teacher and fake score ----------------------------------------------------------------------------------

JOINT = [
    {}, {"guidance": 1.5}, {"micro_batch_size": 3}, {"fuse": False, "guidance": 2.0}, {"sampling": "x_z"},
]  # fmt: skip


def counted_passes(trainer) -> list[int]:
    """Batch sizes of the passes of teacher and fake score, filled while the trainer runs."""
    sizes = []
    for denoiser in (trainer.teacher, trainer.fake_score):
        denoiser.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


@pytest.mark.parametrize("changes", JOINT)
def test_one_pass_gives_the_numbers_of_two(changes):
    one, two = (
        adapted(digits_teacher(null_cond=0), num_classes=3, score_passes=passes, fake_score_lr=0.05, **changes)
        for passes in ("joint", "separate")
    )
    one.step(), two.step()  # the fake score's adapter is no longer 0
    mine, its = one.sample_posterior(step=3), two.sample_posterior(step=3)
    for name in ("z", "eps", "drift"):
        exact = getattr(its, name)
        assert_within(getattr(mine, name), exact, 1e-4 * float(exact.abs().max()), name)
    assert its.drift.abs().max() > 1e-4
    sizes = counted_passes(one)
    one.sample_posterior(step=3)
    assert sizes == [8 * (3 if "guidance" in changes else 2)] * 2


def test_rows_outside_of_one_pass_are_all_adapted():
    one, two = (
        adapted(digits_teacher(), num_classes=3, score_passes=passes, fake_score_lr=0.05)
        for passes in ("joint", "separate")
    )
    for trainer in (one, two):
        trainer.update_fake_score()
    x, t, labels = torch.randn(4, 1, 8, 8, generator=seeded(1)), torch.full((4,), 0.5), torch.arange(4) % 3
    expected = two.fake_score(x, t, labels).detach()
    assert_within(one.fake_score(x, t, labels), expected, 1e-5 * float(expected.abs().max()))
    with pytest.raises(RuntimeError, match="interrupted"), one.fake_score.without_adapter(1, 2):
        raise RuntimeError("interrupted")
    assert torch.equal(one.fake_score(x, t, labels), one.fake_score(x, t, labels))
    with one.fake_score.without_adapter(1, 2), torch.no_grad():
        half = one.fake_score(x, t, labels)
        with pytest.raises(ValueError, match="score_passes must be 'separate'"):
            one.fake_score(x[:3], t[:3], labels[:3])
    assert_within(half[:2], two.teacher(x, t, labels)[:2], 1e-5)
    assert_within(half[2:], expected[2:], 1e-5 * float(expected.abs().max()))
    assert (half - expected)[:2].abs().max() > 1e-4


def test_the_base_is_held_once_and_stays_as_it_is():
    teacher = digits_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = adapted(teacher, num_classes=3)
    base = {id(p): p for p in teacher.parameters()}
    for network in (trainer.generator, trainer.fake_score, trainer.ema.module):
        own = {name: p for name, p in network.named_parameters() if id(p) not in base}
        assert own and all(".lora_" in name for name in own)
        assert {id(p) for p in network.parameters()} >= base.keys()
    start = {name: value.clone() for name, value in trainer.ema.module.state_dict().items() if ".lora_" in name}
    versions = [p._version for p in base.values()]
    trainer.step(), trainer.step()
    assert [p._version for p in base.values()] == versions and all(p.grad is None for p in base.values())
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.state_dict().items())
    moments = [tuple(p.shape) for p in trainer.learners["generator"].optimizer.state]
    assert sorted(moments) == sorted(tuple(p.shape) for p in trainer.generator.parameters() if p.requires_grad)
    ema = trainer.ema.module.state_dict()
    assert any(not torch.equal(ema[name], value) for name, value in start.items())
    assert not torch.equal(trainer.generate(2), trainer.generate(2, ema=False))


def test_only_the_named_layers_get_an_adapter():
    trainer = adapted(digits_teacher(), num_classes=3, adapter_targets=["qkv", "conv1"], adapter_rank=2)
    layers = {name.partition(".lora_")[0] for name in trained_names(trainer.fake_score)}
    assert layers and all(name.endswith(("qkv", "conv1")) for name in layers)
    count = sum(p.numel() for p in trainer.fake_score.parameters() if p.requires_grad)
    assert count == adapters.count(digits_teacher(), trainer.config.adapter)


def test_a_whole_generator_with_an_adapter_for_the_fake_score(tmp_path):
    trainer = adapted(digits_teacher(), num_classes=3, adapter_networks=["fake_score"])
    whole = [name for name, _ in trainer.teacher.named_parameters()]
    assert trained_names(trainer.generator) == [f"denoiser.{name}" for name in whole]
    assert all(".lora_" in name for name in trained_names(trainer.fake_score))
    trainer.step()
    trainer.save(tmp_path / "checkpoint")
    again = EMDTrainer.resume(tmp_path / "checkpoint", digits_teacher())
    trainer.step(), again.step()
    assert_same_state(trainer, again)


CHANGES = [
    {}, {"micro_batch_size": 3, "guidance": 1.5}, {"precision": "bfloat16"}, {"lr_schedule": "cosine"},
    {"rungs": [2.0, 0.5], "score_passes": "joint", "guidance": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, changes):
    def make():
        return digits_teacher(null_cond=0)

    trainer = adapted(make(), num_classes=3, **changes)
    trainer.step()
    trainer.save(tmp_path / "checkpoint")
    state = checkpoint.load(tmp_path / "checkpoint")
    assert all(".lora_" in name for part in ("generator", "fake_score", "ema") for name in state[part])
    again = EMDTrainer.resume(tmp_path / "checkpoint", make())
    mine, its = trainer.step(), again.step()
    assert {key: value.item() for key, value in mine.items()} == {key: value.item() for key, value in its.items()}
    assert_same_state(trainer, again)
    assert torch.equal(trainer.generate(3), again.generate(3))


@pytest.mark.parametrize("trains", [True, False])
def test_a_base_of_other_weights_is_refused(tmp_path, trains):
    trainer = adapted(digits_teacher(), num_classes=3)
    trainer.save(tmp_path / "checkpoint")
    other = moved(digits_teacher(), ["network.down"], 1)
    with pytest.raises(CheckpointError, match="was made with a teacher of other weights"):
        EMDTrainer.resume(tmp_path / "checkpoint", other, trains=trains)


def test_a_sample_alone_is_that_sample_of_the_whole_batch():
    trainer = adapted(digits_teacher(), num_classes=3)
    trainer.step()
    whole = trainer.sample_posterior(step=7)
    alone = trainer.sample_posterior(step=7, samples=range(5, 6))
    for name in ("z", "eps", "drift"):
        torch.testing.assert_close(getattr(alone, name)[0], getattr(whole, name)[5], rtol=1e-4, atol=1e-5)
    assert all(value.isfinite() for name, value in trainer.diagnostics().items() if "bin" not in name)
    assert all(value.isfinite() for value in trainer.gradient_variance().values())


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        randomised(self, 1)

    def forward(self, x, t, cond=None):
        h = self.first(torch.cat([x, t[:, None]], dim=1))
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


def of_blocks() -> Denoiser:
    return Denoiser(Blocks(), schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(3,))


def test_activation_checkpointing_leaves_the_step_as_it_is():
    states = []
    for wanted in (False, True):
        trainer = adapted(of_blocks(), activation_checkpointing=wanted)
        assert len(blocks_of(trainer.generator)) == 3  # not the lists inside the adapters
        trainer.step(), trainer.step()
        states.append(trainer)
    assert_same_state(*states)


def test_a_peft_model_of_the_user_is_the_generator(tmp_path):
    def own():
        denoiser = points_teacher()
        torch.manual_seed(0)
        lora = peft.LoraConfig(r=2, target_modules=["first", "hidden.0"])
        peft.inject_adapter_in_model(lora, denoiser, adapter_name="mine")
        return Generator(denoiser, 2.0)

    trainer = EMDTrainer(points_teacher(), config(adapter_rank=4), generator=own())
    names = trained_names(trainer.generator)
    assert len(names) == 4 and all(".mine." in name for name in names)
    trainer.step()
    trainer.save(tmp_path / "checkpoint")
    again = EMDTrainer.resume(tmp_path / "checkpoint", points_teacher(), generator=own())
    trainer.step(), again.step()
    assert_same_state(trainer, again)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_targets_that_match_nothing_name_the_layers_there_are():
    with pytest.raises(ConfigError, match=r"adapter_targets names 'to_qq'.*there are .*qkv"):
        adapted(digits_teacher(), adapter_targets=["qkv", "to_qq"])


def test_a_layer_that_peft_refuses_is_reported_in_one_line():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1, groups=2)

        def forward(self, x, t, cond=None):
            return self.conv(x)

    teacher = Denoiser(Grouped(), schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(2, 4, 4))
    with pytest.raises(ConfigError, match="peft gives the generator no adapter: ") as error:
        adapted(teacher, adapter_rank=3)
    assert "\n" not in str(error.value)


def test_adapters_without_peft_say_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="adapter_rank needs peft: `pip install"):
        adapted(digits_teacher(), num_classes=3)


def test_a_network_without_layers_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x, t, cond=None):
            return self.scale * x

    teacher = Denoiser(Scale(), schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(2,))
    with pytest.raises(ConfigError, match="no linear layer and no convolution"):
        adapted(teacher)


def test_one_pass_needs_an_adapter_of_ours():
    for changes in ({"adapter_rank": 0}, {"adapter_networks": ["generator"]}):
        with pytest.raises(ConfigError, match="score_passes must be"):
            config(**{"adapter_rank": 2, "score_passes": "joint", **changes})
    with pytest.raises(ConfigError, match="for a fake score that is given"):
        EMDTrainer(points_teacher(), config(adapter_rank=2, score_passes="joint"), fake_score=points_teacher())


def test_a_generator_around_the_teacher_is_refused():
    teacher = points_teacher()
    with pytest.raises(ValueError, match="share parameters"):
        EMDTrainer(teacher, config(adapter_rank=2), generator=Generator(teacher, 2.0))


@pytest.mark.parametrize("networks", [[], ["generator", "generator"], ["teacher"]])
def test_networks_that_cannot_be_adapted(networks):
    with pytest.raises(ConfigError, match="adapter_networks"):
        EMDConfig(adapter_networks=networks)
    assert EMDConfig(adapter=None).adapter.rank == 0
