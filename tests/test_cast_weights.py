"""A frozen teacher without float32 weights: the same numbers bit for bit, and nothing of the original is kept."""

import copy
import gc
import weakref

import pytest
import torch
from networks import FAMILIES, OWN, make, output
from test_trainer import config, digits_teacher, points_teacher
from torch import nn

import emd_fast
from emd_fast import Denoiser, EMDTrainer
from emd_fast import config as configuration
from emd_fast.diffusion.sampler import heun
from emd_fast.diffusion.schedules import EDM
from emd_fast.run import distill
from emd_fast.run.folder import RunError
from emd_fast.run.plan import estimate
from emd_fast.train.cast_weights import cast_weights, matmul_weights, trainable
from emd_fast.train.parameter_counts import ParameterCounts

BF16 = torch.bfloat16


class Called(nn.Module):
    def __init__(self, network, arguments):
        super().__init__()
        self.network, self.arguments = network, arguments

    def forward(self, x, t, cond=None):
        return output(self.network, x, self.arguments)


def reduced(**changes):
    return config(num_classes=3, precision="bfloat16", **changes)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [*FAMILIES, *OWN])
def test_outputs_stay_bit_for_bit_and_the_original_stays_as_it_is(name, fused):
    network, x, arguments = make(name)
    original = Denoiser(Called(emd_fast.fuse(network) if fused else network, arguments), EDM(), "x0")
    before = copy.deepcopy(original.state_dict())
    ours, t = cast_weights(original, BF16), torch.ones(len(x))
    with torch.no_grad(), torch.autocast("cpu", BF16):
        expected, found = original(x, t), ours(x, t)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    for key, value in original.state_dict().items():
        assert value.dtype == before[key].dtype and torch.equal(value, before[key])
    assert all(parameter.requires_grad for parameter in original.parameters())
    sizes = {kind: sum(p.numel() for p in ours.parameters() if p.dtype == kind) for kind in (BF16, torch.float32)}
    share = sizes[BF16] / sum(sizes.values())
    # EDM2 normalises its weights in float32 before it rounds them.
    assert share == 0 and ours is original if "edm2" in name else share > 0.95
    addresses = {p.data_ptr() for p in original.parameters()}
    assert all(p.dtype == BF16 or p.data_ptr() in addresses for p in ours.parameters())


def test_outside_of_autocast_it_computes_as_inside():
    teacher = cast_weights(digits_teacher(), BF16)
    x, t, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        alone = teacher.denoise(x, t, labels)
        with torch.autocast("cpu", BF16):
            assert torch.equal(teacher.denoise(x, t, labels), alone)
        assert heun(teacher, x, labels, steps=2).isfinite().all()


def test_what_somebody_else_reads_too_is_left():
    parts = {
        "first": nn.Linear(4, 8),
        "mine": nn.Linear(8, 8),
        "tied": nn.Linear(8, 8),
        "embedding": nn.Embedding(8, 8),
    }
    network = nn.ModuleDict({**parts, "mixing": nn.MultiheadAttention(8, 2)})
    network.tied.weight = network.embedding.weight
    names = {id(p): name for name, p in network.named_parameters()}
    found = {names[id(p)] for p in matmul_weights(network)}
    assert found == {"first.bias", "mine.weight", "mine.bias", "tied.bias"}


def test_copies_to_train_are_float32_whatever_the_teacher_is():
    teacher = cast_weights(digits_teacher(), BF16)
    for half in (teacher, digits_teacher().to(BF16)):
        assert {p.dtype for p in trainable(half).parameters()} == {torch.float32}
        trainer = EMDTrainer(half, reduced())
        assert {p.dtype for n in (trainer.generator, trainer.fake_score) for p in n.parameters()} == {torch.float32}
        assert not trainer.sample_posterior().drift.any()


def alive(fused: bool, given: bool) -> tuple[list[str], int, int]:
    """The float32 weights of products that outlive their owner; bytes of parameters, and those of the plan."""
    teacher = emd_fast.fuse(digits_teacher()) if fused else digits_teacher()
    counts = ParameterCounts.of(teacher, teacher, teacher)
    names = {id(parameter): name for name, parameter in teacher.named_parameters()}
    watched = [(names[id(p)], weakref.ref(p), weakref.ref(p.untyped_storage())) for p in matmul_weights(teacher)]
    networks = {"generator": emd_fast.Generator(copy.deepcopy(teacher), 2.0)} if given else {}
    trainer = EMDTrainer(teacher, reduced(), **networks)
    del teacher
    trainer.step()
    gc.collect()
    owners = (trainer.teacher, trainer.generator, trainer.fake_score)
    held = sum(p.nbytes for network in owners for p in network.parameters())
    planned = estimate(counts, trainer.config, "replicate", 1, reduced=True).memory["weights"]
    assert len(watched) > 10 and trainer.config.compute.precision == "bfloat16"
    return [name for name, *references in watched if any(r() is not None for r in references)], held, int(planned)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_no_float32_copy_of_the_teacher_is_left_once_its_owner_drops_it(fused, given):
    left, held, planned = alive(fused, given)
    assert left == [] and held == planned


def drift_of_equals(fused: bool) -> tuple[float, float, set]:
    teacher = emd_fast.fuse(digits_teacher()) if fused else digits_teacher()
    trainer = EMDTrainer(teacher, reduced(micro_batch_size=3, langevin_steps=3))
    sampled = trainer.sample_posterior()
    trainer._generator_loss([sampled])
    gradients = [p.grad.abs().max() for p in trainer.generator.parameters() if p.grad is not None]
    kept = {p.dtype for p in trainer.teacher.parameters()}
    return sampled.drift.abs().max().item(), torch.stack(gradients).max().item(), kept


@pytest.mark.parametrize("fused", [False, True])
def test_the_drift_of_equal_weights_is_exactly_zero(fused):
    drift, gradient, kept = drift_of_equals(fused)
    assert drift == 0 and gradient == 0 and kept == {torch.float32, BF16}


def test_replicas_on_ranks_hold_the_same_and_their_drift_is_zero_too(ranks):
    for drift, _, kept in ranks(2, drift_of_equals, False):
        assert drift == 0 and kept == {torch.float32, BF16}
    assert all(left == [] and held == planned for left, held, planned in ranks(2, alive, False, False))


def test_a_teacher_on_the_meta_device_is_rounded_there():
    with torch.device("meta"):
        teacher = points_teacher()
    ours = cast_weights(teacher, BF16)
    assert all(p.is_meta for p in ours.parameters()) and {p.dtype for p in ours.parameters()} == {BF16, torch.float32}


def test_a_run_drops_the_teacher_that_it_has_rounded(tmp_path, monkeypatch):
    small = {"teacher.steps": 1, "teacher.batch_size": 4, "emd.compute.precision": "bfloat16", "emd.batch_size": 4}
    small |= {"emd.steps": 1, "emd.fake_score_warmup": 0, "emd.langevin_steps": 1}
    made, watched = distill.teacher_of, []

    def watch(*arguments):
        teacher, seconds = made(*arguments)
        watched.extend(weakref.ref(p) for p in matmul_weights(teacher))
        return teacher, seconds

    def look(*_):
        gc.collect()
        raise RunError("seen" if watched and not any(reference() is not None for reference in watched) else "alive")

    monkeypatch.setattr(distill, "teacher_of", watch)
    monkeypatch.setattr(distill, "train", look)
    with pytest.raises(RunError, match="seen"):
        distill.distill(configuration.load("digits", small), tmp_path)
