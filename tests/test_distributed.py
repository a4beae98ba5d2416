"""Several ranks against one: the same noise, the same gradients; what is gathered, and how often."""

import dataclasses
import itertools

import pytest
import torch
from helpers import HostReads, assert_within, randomised
from torch import nn
from torch.distributed.tensor import DTensor

from emd_fast import Denoiser, EMDConfig, EMDTrainer, distributed, fusion_report
from emd_fast.config import ConfigError
from emd_fast.diffusion.schedules import EDM
from emd_fast.teachers.small_unet import SmallUNet
from emd_fast.train.preview import denoised


class Blocks(nn.Module):
    """network(x, t, cond) of a first layer, three blocks and a last layer; sizes that two ranks do not divide."""

    def __init__(self, seed: int, classes: int = 3, width: int = 7, gain: bool = False) -> None:
        super().__init__()
        # A number alone, which cannot be split.
        self.gain = nn.Parameter(torch.ones(())) if gain else 1.0
        self.first = nn.Linear(4, width)
        self.label = nn.Embedding(classes, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(width, 3)
        self.register_buffer("scale", torch.full((1,), 1.5))
        randomised(self, seed)

    def forward(self, x, t, cond=None):
        h = self.first(torch.cat([x, t[:, None].to(x.dtype)], dim=1))
        if cond is not None:
            h = h + self.label(cond)
        for block in self.blocks:
            h = h + block(h)
        return self.scale * self.gain * self.last(h)


def teacher(seed: int = 1, gain: bool = False) -> Denoiser:
    return Denoiser(Blocks(seed, gain=gain), EDM(), "edm", sigma_data=0.5, sample_shape=(3,), null_cond=0)


def config(**changes) -> EMDConfig:
    defaults = {"steps": 4, "batch_size": 12, "langevin_steps": 2, "num_classes": 3, "fake_score_warmup": 1}
    return EMDConfig(**{**defaults, "gamma_z": [[0.1, 0.001], [1.0, 0.02]], **changes})


def one_step(settings: EMDConfig, world_dependent_start: bool = False) -> dict:
    """What the first step draws, gives as gradients and leaves; whole tensors."""
    # Ranks that start from different weights take those of rank 0.
    trainer = EMDTrainer(teacher(1 + (distributed.rank() if world_dependent_start else 0), gain=True), settings)
    drawn, samples = {}, []
    original = trainer._e_step

    def watched(micro_batch):
        result = original(micro_batch)
        samples.append((micro_batch.first, result))
        return result

    trainer._e_step = watched
    metrics = trainer.step() | trainer.diagnostics()
    for first, result in samples:
        for i in range(len(result.t)):
            drawn[first + i] = (result.t[i].clone(), result.cond[i].clone())
    gradients = {
        f"{name}.{key}": whole(value.grad)
        for name in ("generator", "fake_score")
        for key, value in getattr(trainer, name).named_parameters()
    }
    metrics |= trainer.gradient_variance()
    return {
        "drawn": drawn,
        "gradients": gradients,
        "ema": {key: whole(value) for key, value in trainer.ema.module.state_dict().items()},
        "metrics": {key: value.item() for key, value in metrics.items()},
        "shown": torch.stack([trainer.generate(3), *denoised(trainer, 3).values()]),
    }


def whole(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_same_step(results, alone):
    drawn = {}
    for result in results:
        drawn |= result["drawn"]
    assert drawn.keys() == alone["drawn"].keys()
    for sample, (t, cond) in alone["drawn"].items():
        assert torch.equal(drawn[sample][0], t) and torch.equal(drawn[sample][1], cond), sample
    for result in results:
        for what in ("gradients", "ema"):
            for key, value in alone[what].items():
                largest = float(value.abs().max())
                assert_within(result[what][key], value, 1e-6 + 2e-5 * largest, f"{what} {key}")
        assert result["metrics"].keys() == alone["metrics"].keys()
        for key, value in alone["metrics"].items():
            # A bin of log-SNR without a sample is NaN.
            assert result["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok="bin" in key), key
        torch.testing.assert_close(result["shown"], alone["shown"], rtol=1e-4, atol=1e-5)


# Plain gradient steps, so that the weights after a step show the gradients before clipping and AdamW's sign.
STEP = {"fake_score_updates": 1, "grad_clip": 0.5, "guidance": 1.5}


@pytest.mark.parametrize("micro", [1, 5])
def test_micro_batches_leave_the_step_as_it_is(micro):
    assert_same_step([one_step(config(micro_batch_size=micro, **STEP))], one_step(config(**STEP)))


def several(settings_of: list[EMDConfig]) -> list[dict]:
    return [one_step(settings, world_dependent_start=True) for settings in settings_of]


BOTH = ("replicate", "fsdp")


@pytest.mark.parametrize(("world", "modes"), [(2, BOTH), (3, BOTH), (4, ("fsdp", "hybrid"))])
@pytest.mark.slow
def test_the_same_step_on_any_number_of_ranks(ranks, world, modes):
    settings = [
        config(parallel=mode, shard_group=2 if mode == "hybrid" else 0, micro_batch_size=micro, **STEP)
        for mode, micro in itertools.product(modes, (1, 2, 4))
    ]
    # 13 samples: shares that differ.
    settings.append(dataclasses.replace(settings[-1], batch_size=13, micro_batch_size=0, activation_checkpointing=True))
    results = ranks(world, several, settings)
    alone = {size: one_step(config(batch_size=size, **STEP)) for size in (12, 13)}
    for index, each in enumerate(settings):
        assert_same_step([ranks[index] for ranks in results], alone[each.batch_size])


@pytest.mark.slow
def test_the_same_step_where_e_step_and_m_step_share_a_pass(ranks):
    """Replicas share the generator's pass, and sharded generators do not."""
    objectives = [{"objective": "vsd", "weighting": "adaptive"}, {"objective": "sid"}, {"gamma_z": 0.0}]
    settings = [config(parallel=mode, **STEP, **changes) for changes in objectives for mode in BOTH]
    results = ranks(2, several, settings)
    for index, each in enumerate(settings):
        alone = one_step(dataclasses.replace(each, parallel="auto"))
        assert_same_step([ranks[index] for ranks in results], alone)


def images(changes=None) -> tuple[Denoiser, EMDConfig]:
    """A network that fuse() knows, and a configuration for it."""
    network = randomised(SmallUNet(1, 8, num_classes=3), 4)
    settings = {"steps": 2, "batch_size": 4, "langevin_steps": 2, "gamma_z": 0.001, "num_classes": 3}
    teacher = Denoiser(network, EDM(), "edm", sigma_data=0.5, sample_shape=(1, 4, 4))
    return teacher, EMDConfig(**settings | (changes or {}))


def points(changes=None) -> tuple[Denoiser, EMDConfig]:
    return teacher(gain=True), config(**STEP | (changes or {}))


def from_rank_0(make, mode: str) -> dict:
    network, settings = make({"parallel": mode})
    network.register_buffer("table", torch.arange(3.0), persistent=False)
    if distributed.rank():
        network.to("meta")
    # As fuse() lays weights out on a GPU.
    trainer = EMDTrainer(network.to(memory_format=torch.channels_last), settings)
    assert torch.equal(trainer.teacher.table, torch.arange(3.0))
    assert not any(p.is_meta for net in (trainer.teacher, trainer.ema.module) for p in net.parameters())
    trainer.step()
    fused = [bool(fusion_report(net).fused) for net in (trainer.teacher, trainer.generator, trainer.fake_score)]
    assert fused == [make is images] * 3
    return {key: whole(value) for key, value in trainer.ema.module.state_dict().items()}


@pytest.mark.parametrize(("make", "tolerance"), [(points, 2e-5), (images, 1e-4)])
@pytest.mark.parametrize("mode", ["replicate", "fsdp"])
def test_ranks_without_weights_take_those_of_rank_0(ranks, make, tolerance, mode):
    network, settings = make({"fuse": False})
    alone = EMDTrainer(network, settings)
    alone.step()
    for result in ranks(2, from_rank_0, make, mode):
        for key, value in alone.ema.module.state_dict().items():
            assert_within(result[key], value, 1e-6 + tolerance * float(value.abs().max()), key)


def test_two_ranks_with_fewer_samples_are_refused(ranks):
    for error in ranks(2, refused):
        assert "batch_size must be at least the number of ranks, 2, got 1" in error


def refused() -> str:
    with pytest.raises(ConfigError) as error:
        EMDTrainer(teacher(), config(batch_size=1))
    return str(error.value)


def reduced() -> dict:
    trainer = EMDTrainer(teacher(), config(parallel="fsdp", precision="bfloat16"))
    trainer.step()
    metrics = trainer.step()
    return {
        "teacher": {p.dtype for p in trainer.teacher.parameters()},
        "weights": {p.dtype for net in (trainer.generator, trainer.fake_score) for p in net.parameters()},
        "gradients": {p.grad.dtype for net in (trainer.generator, trainer.fake_score) for p in net.parameters()},
        "optimizer": {v.dtype for s in trainer.learners["generator"].optimizer.state.values() for v in s.values()},
        "trains": [any(p.requires_grad for p in n.parameters()) for n in (trainer.teacher, trainer.ema.module)],
        "sharded": [distributed.is_sharded(n) for n in (trainer.teacher, trainer.generator, trainer.ema.module)],
        "metrics": {key: value.item() for key, value in metrics.items()},
    }


def test_sharding_computes_in_bfloat16_and_keeps_float32_weights(ranks):
    alone = EMDTrainer(teacher(), config(precision="bfloat16"))
    alone.step()
    expected = {key: value.item() for key, value in alone.step().items()}
    for result in ranks(2, reduced):
        assert result["teacher"] == {torch.bfloat16}
        assert result["weights"] == result["gradients"] == result["optimizer"] == {torch.float32}
        assert result["trains"] == [False, False] and result["sharded"] == [True, True, True]
        for key in ("z_rms", "fake_score_loss", "fake_score_grad_norm"):
            assert result["metrics"][key] == pytest.approx(expected[key], rel=0.05), key


@pytest.mark.parametrize("changes", [{}, {"guidance": 1.5, "lr_schedule": "cosine", "micro_batch_size": 5}])
def test_a_step_asks_no_device_for_values(changes):
    trainer = EMDTrainer(teacher(), config(gamma_eps=[[0.1, 0.1], [1.0, 0.2]], **changes))
    trainer.step()
    asking: list[str] = []
    with HostReads(asking.append):
        trainer.step()
        trainer.diagnostics()
    assert not asking
