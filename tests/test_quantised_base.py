"""A base in 8 or 4 bits: what is rounded, that every pass sees the same rounded weights, and what is refused."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from helpers import assert_within, seeded
from test_adapters import Blocks, moved
from test_trainer import assert_same_state, config, digits_teacher, points_teacher
from torch import nn

from emd_fast import Denoiser, EMDTrainer, Generator, distributed, schedules
from emd_fast.config import ConfigError
from emd_fast.export.pipeline import export, load
from emd_fast.run import distill
from emd_fast.run.plan import plan
from emd_fast.train import networks, quantised_base
from emd_fast.train.checkpoint import CheckpointError
from emd_fast.train.fingerprint import fingerprint
from emd_fast.train.parameter_counts import ParameterCounts
from emd_fast.train.quantised_base import QuantisedLinear, dequantised, quantised

pytest.importorskip("peft")
pytest.importorskip("torchao")
FORMATS = ("int8", "fp8", "nf4")
WIDTH = 64


def wide_teacher() -> Denoiser:
    """Three blocks of WIDTH; the weight of its first layer is the first of the network."""
    network = Blocks()
    network.first, network.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
    network.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3))
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seeded(1)) / WIDTH**0.5
    return Denoiser(network, schedules.EDM(), "edm", sigma_data=0.5, sample_shape=(3,))


def adapted(teacher: Denoiser, base_dtype: str, **changes) -> EMDTrainer:
    return EMDTrainer(teacher, config(**{"adapter_rank": 4, "base_dtype": base_dtype, **changes}))


def layers(network: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: m for name, m in network.named_modules() if isinstance(m, QuantisedLinear)}


def rounded(teacher: Denoiser, base_dtype: str) -> Denoiser:
    """The teacher with the weights that the bits stand for, as plain layers."""
    copied = quantised(copy.deepcopy(teacher), base_dtype)
    dequantised(copied)
    return copied


def test_the_weights_are_the_nearest_of_the_format():
    teacher = wide_teacher()
    for base_dtype in FORMATS:
        found = layers(quantised(teacher, base_dtype))
        assert set(found) == {*(f"network.blocks.{i}.0" for i in range(3)), "network.last"}
        for name, layer in found.items():
            weight = teacher.get_submodule(name).weight.detach()
            error, largest = (layer.weight - weight).abs(), weight.abs().amax(1, keepdim=True)
            if base_dtype == "int8":  # half a step of 255 over twice the largest of the row
                assert (error <= largest / 255 + 1e-6).all()
            elif base_dtype == "fp8":  # half a step of a 3-bit mantissa; below, of the smallest number
                assert (error <= weight.abs() / 16 + largest / 448 / 2**10 + 1e-6).all()
            else:  # half the widest gap of the 16 numbers, and the rounding of the scales
                blocks = weight.reshape(-1, 64)
                assert (error.reshape(-1, 64) <= 0.17 * blocks.abs().amax(1, keepdim=True)).all()
            assert error.max() > 1e-4
            assert torch.equal(layer.bias, teacher.get_submodule(name).bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base_dtype", FORMATS)
def test_the_product_and_its_derivative_are_those_of_the_rounded_weight(base_dtype, dtype):
    layer = nn.Linear(WIDTH, 2 * WIDTH, dtype=dtype).requires_grad_(False)
    made = QuantisedLinear.of(layer, quantised_base.quantiser(base_dtype)(layer.weight))
    plain = copy.deepcopy(layer)
    plain.weight.copy_(made.weight)
    assert made.weight.dtype == dtype and not torch.equal(plain.weight, layer.weight)
    x = torch.randn(3, 5, WIDTH, generator=seeded(2)).to(dtype)
    for one in (made, plain):
        one.x = x.clone().requires_grad_()
        one.y = one(one.x)
        one.y.backward(torch.linspace(-1, 1, one.y.numel()).view(one.y.shape).to(dtype))
    assert torch.equal(made.y, plain.y) and torch.equal(made(x), plain.y)
    torch.testing.assert_close(made.x.grad, plain.x.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x.float()), plain(x.float()))


def test_a_backward_pass_keeps_no_copy_of_the_weight():
    layer = QuantisedLinear.of(
        nn.Linear(WIDTH, WIDTH).requires_grad_(False), quantised_base.quantiser("int8")(torch.eye(WIDTH))
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(3, WIDTH, requires_grad=True))
    assert not kept


@pytest.mark.parametrize("base_dtype", FORMATS)
def test_it_compiles_without_a_graph_break(base_dtype):
    layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    plain = nn.Sequential(QuantisedLinear.of(layer, quantised_base.quantiser(base_dtype)(layer.weight)), nn.Tanh())
    compiled = torch.compile(plain, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, WIDTH, requires_grad=True)
    mine, its = compiled(x), plain(x)
    assert torch.equal(mine, its)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (mine, its)))


TEACHERS = {"images": (digits_teacher, {"num_classes": 3}), "vectors": (wide_teacher, {})}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_dtype", FORMATS)
@pytest.mark.parametrize("kind", TEACHERS)
def test_delta_is_0_while_the_adapters_are(kind, base_dtype, precision):
    make, more = TEACHERS[kind]
    trainer = adapted(make(), base_dtype, precision=precision, gamma_z=0.05, **more)
    assert layers(trainer.teacher)
    seen = []
    trainer.sample_posterior(watch=lambda step: seen.append(step.delta.abs().max().item()))
    assert seen == [0, 0]


@pytest.mark.parametrize("base_dtype", FORMATS)
@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("changes", [{}, {"score_passes": "joint", "micro_batch_size": 3}, {"fuse": False}])
def test_the_steps_are_those_of_a_base_with_the_rounded_weights(kind, base_dtype, changes):
    make, more = TEACHERS[kind]
    one = adapted(make(), base_dtype, **more, **changes)
    its = adapted(rounded(make(), base_dtype), "auto", **more, **changes)
    for _ in range(2):
        mine, exact = one.step(), its.step()
    for key, value in exact.items():
        assert mine[key].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-7), key
    assert_within(one.generate(3), its.generate(3), 1e-5)
    whole = adapted(make(), "auto", **more, **changes)
    whole.step(), whole.step()
    assert (whole.generate(3) - its.generate(3)).abs().max() > 1e-3  # the rounding is seen


def test_the_bits_are_held_once():
    teacher = digits_teacher()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer = adapted(teacher, "int8", num_classes=3)
    bits = {id(buffer) for layer in layers(trainer.teacher).values() for buffer in layer.buffers()}
    assert bits
    for network in (trainer.generator, trainer.fake_score, trainer.ema.module):
        assert {id(b) for layer in layers(network).values() for b in layer.buffers()} == bits
        trained = [p for p in network.parameters() if p.requires_grad or network is trainer.ema.module]
        assert trained and all(p.dtype == torch.float32 for p in trained)
    trainer.step()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize("base_dtype", FORMATS)
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, base_dtype):
    trainer = adapted(digits_teacher(), base_dtype, num_classes=3)
    assert trainer.teacher_facts["sha256"] == fingerprint(digits_teacher())  # of the weights as they came
    trainer.step()
    trainer.save(tmp_path / "checkpoint")
    again = EMDTrainer.resume(tmp_path / "checkpoint", digits_teacher())
    trainer.step(), again.step()
    assert_same_state(trainer, again)
    with pytest.raises(CheckpointError, match="base_dtype"):
        EMDTrainer.resume(
            tmp_path / "checkpoint", digits_teacher(), config=dataclasses.replace(trainer.config, base_dtype="auto")
        )
    with pytest.raises(CheckpointError, match="other weights"):
        EMDTrainer.resume(tmp_path / "checkpoint", moved(digits_teacher(), ["network.down"], 1))


@pytest.mark.parametrize("base_dtype", FORMATS)
def test_a_merged_export_samples_as_the_trainer(tmp_path, base_dtype):
    trainer = adapted(digits_teacher(), base_dtype, num_classes=3, generator_lr=0.02)
    trainer.step(), trainer.step()
    loaded = load(export(trainer, tmp_path / "one.safetensors", "safetensors"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and not layers(loaded)
    assert_within(loaded.sample(3), trainer.generate(3), 1e-4)
    assert layers(trainer.generator)


def test_a_whole_generator_starts_from_the_weights_as_they_came():
    trainer = adapted(digits_teacher(), "fp8", num_classes=3, adapter_networks=["fake_score"])
    assert not layers(trainer.generator) and layers(trainer.fake_score)
    teacher = digits_teacher()
    assert all(torch.equal(p, teacher.get_parameter(n)) for n, p in trainer.generator.denoiser.named_parameters())
    trainer.step()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("base_dtype", FORMATS)
def test_the_plan_counts_the_bytes_that_are_held(base_dtype, precision):
    teacher = wide_teacher()
    settings = config(adapter_rank=4, base_dtype=base_dtype, precision=precision)
    counts = ParameterCounts.of(teacher, Generator(teacher, 2.0), teacher, settings.adapter)
    found = plan(counts, settings, devices=1, reduced=precision == "bfloat16").chosen.memory["weights"]
    prepared = networks.prepare(teacher, settings, None, None)
    tensors = {id(t): t for network in prepared.three for t in (*network.parameters(), *network.buffers())}
    assert found == pytest.approx(sum(t.nbytes for t in tensors.values()), rel=0.02)  # NF4's 16 numbers of each layer
    assert found < 0.7 * 4 * (counts.teacher + counts.small)
    assert [f.mode for f in plan(counts, settings, devices=4).others] == []


def test_a_base_without_memory_is_quantised_too():
    prepared = networks.prepare(wide_teacher().to("meta"), config(adapter_rank=4, base_dtype="int8"), None, None)
    assert all(b.is_meta for layer in layers(prepared.three[1]).values() for b in layer.buffers())


def test_auto_keeps_a_quantised_base_whole():
    settings = config(adapter_rank=4, base_dtype="int8")
    assert quantised_base.resolve(settings, 2 * 10**9, 4) == ("replicate", "a quantised base is whole on every rank")
    assert quantised_base.resolve(dataclasses.replace(settings, base_dtype="auto"), 2 * 10**9, 4)[0] == "fsdp"


def steps(base_dtype: str, from_rank_0: bool) -> dict:
    teacher = wide_teacher()
    if from_rank_0 and distributed.rank():
        teacher.to("meta")
    trainer = adapted(teacher, base_dtype, batch_size=6)
    metrics = trainer.step()
    kept = [b for layer in layers(trainer.teacher).values() for b in layer.buffers()]
    assert {id(b) for m in layers(trainer.ema.module).values() for b in m.buffers()} == set(map(id, kept))
    return {"shown": trainer.generate(3), **{key: value.item() for key, value in metrics.items()}}


@pytest.mark.parametrize(("base_dtype", "from_rank_0"), [("int8", False), ("fp8", True), ("nf4", True)])
@pytest.mark.slow
def test_every_rank_holds_the_same_bits(ranks, base_dtype, from_rank_0):
    alone = steps(base_dtype, False)
    for rank in ranks(2, steps, base_dtype, from_rank_0):
        torch.testing.assert_close(rank.pop("shown"), alone["shown"], rtol=1e-4, atol=1e-5)
        assert rank == pytest.approx({k: v for k, v in alone.items() if k != "shown"}, rel=1e-3, abs=1e-7)


IMPORTS = """
import diffusers, torch, warnings
warnings.simplefilter("error")
from emd_fast.teachers.diffusers.folder import import_diffusers
from emd_fast.train import adapters, quantised_base
import_diffusers().DiTTransformer2DModel
adapters._peft(), quantised_base.quantiser("int8")
"""


@pytest.mark.slow
def test_its_import_says_nothing():
    pytest.importorskip("diffusers")
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    assert done.stderr == done.stdout == ""


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter_rank": 0}, 'base_dtype must be "auto" where the fake score has no adapter'),
        ({"adapter_networks": ["generator"]}, 'base_dtype must be "auto" where the fake score has no adapter'),
        ({"parallel": "fsdp"}, 'parallel must be "replicate" for base_dtype "int8", got "fsdp"'),
        ({"parallel": "hybrid"}, 'parallel must be "replicate"'),
        ({"base_dtype": "int3"}, "base_dtype"),
    ],
)
def test_configurations_that_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**{"adapter_rank": 4, "base_dtype": "int8", **changes})


def test_a_fake_score_of_another_base_is_refused():
    with pytest.raises(ConfigError, match="base_dtype must be 'auto' for a fake score that is given"):
        EMDTrainer(points_teacher(), config(adapter_rank=2, base_dtype="int8"), fake_score=points_teacher())


def test_without_torchao_nothing_begins(monkeypatch, tmp_path):
    from emd_fast import config as configuration

    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torchao", None)
    changes = {"emd.adapter.rank": 2, "emd.adapter.base_dtype": "fp8"}
    with pytest.raises(ConfigError, match=r'base_dtype "fp8" needs torchao .*emd_fast\[quantized\]'):
        distill.distill(configuration.load("digits", changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_torchao_refuses_is_told_in_one_line(monkeypatch):
    def refuses(weight):
        raise RuntimeError("no such conversion\non this device")

    monkeypatch.setattr(quantised_base, "quantiser", lambda base_dtype: refuses)
    with pytest.raises(
        ConfigError, match=r'base_dtype must be "auto" here: torchao makes no fp8 of last: no such conversion$'
    ):
        adapted(wide_teacher(), "fp8")


def test_sid_differentiates_through_one_pass_of_teacher_and_fake_score():
    found = []
    for passes in ("separate", "joint"):
        trainer = adapted(wide_teacher(), "int8", score_passes=passes, objective="sid", weighting="adaptive")
        trainer.step()
        found.append(trainer.step())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-7)
