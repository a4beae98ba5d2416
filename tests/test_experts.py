"""A teacher of two networks, Wan 2.2 A14B: which network computes what, in passes, updates, exports and plans."""

import functools
import json
import unittest.mock

import pytest
import torch

from emd_fast.config import ConfigError
from emd_fast.export.pipeline import NotForStock, export, load

diffusers = pytest.importorskip("diffusers")

import architectures  # noqa: E402
from test_architectures import pipeline_of, sampled, trained  # noqa: E402

from emd_fast.teachers import diffusers as teachers  # noqa: E402
from emd_fast.teachers.diffusers.architectures import Experts  # noqa: E402

NAME = "WanTransformer3DModel, 2.2 A14B"
ROW = architectures.ROWS[NAME]
COND = ROW.cond(architectures.LENGTHS)


@pytest.fixture
def folder(tmp_path):
    pipeline_of(ROW).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def loaded(folder, **options):
    return teachers.load(folder, **ROW.size, **options)


def test_each_network_has_the_guidance_that_the_stock_pipeline_gives_it(folder):
    pipeline = pipeline_of(ROW)
    null = ROW.cond(ROW.null)
    called = []
    for name in ("transformer", "transformer_2"):
        module = getattr(pipeline, name)
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    found, _ = sampled(pipeline, ROW, {**ROW.call(COND, null), "guidance_scale_2": 1.5})
    assert called == ["transformer"] * 4 + ["transformer_2"] * 2
    teacher, plain = loaded(folder, guidance_2=1.5), loaded(folder)
    teacher.null_cond = plain.null_cond = null
    x, t = torch.cat([x for _, _, x, _ in found]), torch.stack([t for _, t, _, _ in found]).repeat_interleave(2)
    theirs = torch.cat([output for output, *_ in found])
    cond = COND.repeat(3, 1, 1)
    teacher.null_cond = plain.null_cond = null[:1].expand(6, -1, -1).clone()
    teacher.null_cond[1::2] = plain.null_cond[1::2] = null[1]
    bound = {"rtol": 0, "atol": 1e-5 * theirs.abs().max().item()}
    with torch.no_grad():
        torch.testing.assert_close(teacher.guided(x, t, cond, 3.0), theirs, **bound)  # one batch for both networks
        torch.testing.assert_close(plain.guided(x, t, cond, 3.0)[:4], theirs[:4], **bound)
        assert not torch.allclose(plain.guided(x, t, cond, 3.0)[4:], theirs[4:], **bound)
        assert torch.equal(teacher.guided(x, t, cond, None), teacher(x, t, cond))


def test_a_mixed_batch_is_each_network_on_its_rows(folder):
    teacher = loaded(folder)
    x, cond = torch.randn(5, *teacher.sample_shape), torch.randn(5, 4, 24)
    below = torch.nextafter(torch.tensor(500.0), torch.tensor(0.0)).item()
    index = torch.tensor([20.0, 500.0, below, 900.0, 499.0])  # the boundary itself is of the first network
    network = teacher.network
    high, low = network.alone(False), network.alone(True)
    with torch.no_grad():
        ours = network(x, index, cond)
        for one, rows in ((high, [1, 3]), (low, [0, 2, 4])):
            torch.testing.assert_close(ours[rows], one(x[rows], index[rows], cond[rows]), rtol=0, atol=0)
        assert torch.equal(network(x, index + 500, cond), high(x, index + 500, cond))
        assert torch.equal(network(x, index / 2, cond), low(x, index / 2, cond))
        assert not torch.allclose(high(x, index, cond), low(x, index, cond), atol=0.1)


def test_a_network_that_no_row_needs_has_gradients_of_0(folder):
    teacher = loaded(folder).requires_grad_(True)
    x, cond = torch.randn(2, *teacher.sample_shape), torch.randn(2, 4, 24)
    ours = teacher(x, torch.tensor([0.6, 0.9]), cond)
    with torch.no_grad():
        assert torch.equal(ours, teacher(x, torch.tensor([0.6, 0.9]), cond))
    ours.square().mean().backward()
    assert all(p.grad is not None and not p.grad.any() for p in teacher.network.second.parameters())
    alone = loaded(folder).network.alone(False).requires_grad_(True)
    alone(x, torch.tensor([600.0, 900.0]), cond).square().mean().backward()
    for ours, theirs in zip(teacher.network.model.parameters(), alone.parameters(), strict=True):
        assert ours.grad.any() and torch.equal(ours.grad, theirs.grad)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(("t_star", "name"), [(1.0, "transformer"), (0.5, "transformer"), (0.3, "transformer_2")])
def test_the_generator_starts_as_the_network_of_its_t_star(folder, t_star, name):
    teacher, started = loaded(folder), getattr(pipeline_of(ROW), name).state_dict()
    trainer = trained(teacher, ROW, steps=0, t_star=t_star)
    own = trainer.generator.denoiser.network.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in started.items())
    assert parameters(trainer.generator) * 2 == parameters(trainer.fake_score) == parameters(teacher)
    before = [p.clone() for p in trainer.fake_score.parameters()]
    trainer.step()
    changed = [not torch.equal(p, was) for p, was in zip(trainer.fake_score.parameters(), before, strict=True)]
    assert sum(changed) > 0.9 * len(changed)  # its batch has times of both


def test_the_rows_are_grouped_once_in_an_e_step(folder):
    counts = []
    for steps in (1, 4):
        trainer = trained(loaded(folder), ROW, steps=0)
        with unittest.mock.patch.object(Experts, "_order", autospec=True, side_effect=Experts._order) as order:
            trainer.posterior.steps = steps
            trainer.sample_posterior()
        counts.append(order.call_count)
    assert counts == [2, 2]  # of the teacher and of the fake score


@pytest.mark.parametrize("passes", ["separate", "joint"])
def test_adapters_on_both_networks(folder, passes):
    pytest.importorskip("peft")
    options = {"adapter_rank": 2, "score_passes": passes, "fake_score_lr": 0.05}
    trainer = trained(loaded(folder), ROW, **options)
    own = [p for p in trainer.fake_score.parameters() if p.requires_grad]
    assert parameters(trainer.generator) * 2 == parameters(trainer.fake_score)
    assert sum(p.abs().max() > 0 for p in own) == len(own)
    ours = trainer.sample_posterior()
    trainer.fake_score.without_adapter = None
    theirs = trainer.sample_posterior()  # the same weights, in separate passes
    torch.testing.assert_close(ours.drift, theirs.drift, rtol=0, atol=1e-4 * theirs.drift.abs().max().item())
    assert not torch.equal(theirs.drift, torch.zeros_like(theirs.drift))


def test_a_lora_of_a_generator_is_for_the_first_network_of_the_stock_pipeline(folder, tmp_path):
    pytest.importorskip("peft")
    trainer = trained(loaded(folder), ROW, adapter_rank=2, guidance=None)
    path = export(trainer, tmp_path / "lora", "lora")
    pipeline = pipeline_of(ROW)
    noise, plain = (x for x in sampled(pipeline, ROW, ROW.call(COND, None), steps=1)[0][0][2:])
    pipeline.load_lora_weights(path)
    ((_, _, _, x),), _ = sampled(pipeline, ROW, ROW.call(COND, None), steps=1)
    with torch.no_grad():
        ours = trainer.ema.module(noise, COND)
    torch.testing.assert_close(x, ours, rtol=0, atol=2e-5 * ours.abs().max().item())
    assert not torch.allclose(x, plain, rtol=0, atol=1e-3)


def test_an_exported_generator_is_one_network(folder, tmp_path):
    trainer = trained(loaded(folder), ROW)
    path = export(trainer, tmp_path / "one-step")
    index = json.loads((path / "model_index.json").read_text())
    assert index["transformer_2"] == [None, None] and index["boundary_ratio"] is None
    assert not (path / "transformer_2").exists()
    again = teachers.load(path, **ROW.size)
    assert not isinstance(again.network, Experts) and parameters(again) * 2 == parameters(trainer.teacher)


def test_rungs_on_both_sides_of_the_boundary_need_both_networks(folder, tmp_path):
    trainer = trained(loaded(folder), ROW, rungs=[1.0, 0.3], input_scale=None)
    assert parameters(trainer.generator) == parameters(trainer.teacher)
    with pytest.warns(NotForStock):
        path = export(trainer, tmp_path / "two-steps")
    assert not (path / "model_index.json").exists()
    again = load(path)
    assert torch.equal(again.sample(2, COND), trainer.generate(2, COND))
    assert not torch.allclose(again.sample(2, COND), again.sample(2, COND, calls=1), atol=0.01)
    with pytest.raises(ValueError, match="has two networks, and a file holds one"):
        export(trainer, tmp_path / "two.safetensors", "safetensors")
    one = trained(loaded(folder), ROW, rungs=[1.0, 0.6], input_scale=None)
    assert parameters(one.generator) * 2 == parameters(one.teacher)


def test_one_of_the_networks_can_be_loaded_alone(folder):
    teacher = loaded(folder)
    for part, below in (("transformer", False), ("transformer_2", True)):
        alone = loaded(folder / part)
        x, t = torch.randn(2, *alone.sample_shape), torch.tensor([0.1, 0.9])
        with torch.no_grad():
            assert torch.equal(alone(x, t, COND), teacher.network.alone(below)(x, 1000 * t, COND))


@pytest.mark.parametrize(
    ("index", "config", "said"),
    [
        ({"boundary_ratio": None}, {}, "boundary_ratio = None: a number between 0 and 1 is needed"),
        ({"boundary_ratio": 1.5}, {}, "boundary_ratio = 1.5: a number between 0 and 1 is needed"),
        ({"boundary_ratio": "0.5"}, {}, "a number between 0 and 1 is needed"),
        ({}, {"num_layers": 3}, "of different configurations: two networks of one are supported"),
    ],
)
def test_two_networks_that_do_not_belong_together_are_refused(folder, index, config, said):
    for path, changes in ((folder / "model_index.json", index), (folder / "transformer_2" / "config.json", config)):
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ConfigError, match=said) as error:
        loaded(folder)
    assert "\n" not in str(error.value)


def test_two_networks_of_another_class_and_a_second_guidance_of_one_network_are_refused(folder, tmp_path):
    flux = architectures.ROWS["FluxTransformer2DModel"]
    pipeline_of(flux).save_pretrained(tmp_path / "flux")
    with pytest.raises(ConfigError, match="one network: leave guidance_2 out"):
        teachers.load(tmp_path / "flux", guidance_2=2.0, **flux.size)
    path = tmp_path / "flux" / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "transformer_2": index["transformer"]}))
    with pytest.raises(ConfigError, match="one FluxTransformer2DModel alone is supported"):
        teachers.load(tmp_path / "flux")
    with pytest.raises(ConfigError, match="holds one: give the folder without --teacher-config"):
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        teachers.load(weights, config=folder)


def updates(folder, **changes):
    """Training steps on this rank's share; which networks its rows needed in each pass with gradients."""
    needed = []
    trainer = trained(loaded(folder), ROW, steps=0, batch_size=4, micro_batch_size=1, gamma_z=0.02, **changes)
    plain = Experts._order

    def order(network, index):
        if torch.is_grad_enabled():
            needed.append(network.below(index).tolist())
        return plain(network, index)

    with unittest.mock.patch.object(Experts, "_order", order):
        metrics = [{key: value.item() for key, value in trainer.step().items()} for _ in range(2)]
    return metrics, trainer.generate(2, COND), needed


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"parallel": "fsdp"},
        {"parallel": "replicate"},
        {"parallel": "fsdp", "adapter_rank": 2},
        {"parallel": "fsdp", "gather": "block"},
        {"parallel": "fsdp", "gather": "block", "adapter_rank": 2},
        {"parallel": "fsdp", "gather": "block", "adapter_rank": 2, "score_passes": "joint"},
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ranks_whose_rows_need_different_networks_do_what_one_process_does(folder, ranks, options, precision):
    if "adapter_rank" in options:
        pytest.importorskip("peft")
    metrics, samples, _ = updates(folder, precision=precision, **{**options, "parallel": "auto"})
    bound = 1e-4 if precision == "float32" else 0.05
    found = ranks(2, functools.partial(updates, precision=precision, **options), folder)
    for theirs, drawn, _ in found:
        for ours, its in zip(metrics, theirs, strict=True):
            for key, value in ours.items():
                assert its[key] == pytest.approx(value, rel=bound, abs=1e-7), key
        torch.testing.assert_close(drawn, samples, rtol=0, atol=bound * samples.abs().max().item())
    assert found[0][2] != found[1][2]  # else both ranks would make the same passes anyway


def test_a_plan_of_the_published_configuration_counts_both_networks(tmp_path, capsys):
    from emd_fast.cli import commands

    a14b = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
    index = {"_class_name": "WanPipeline", "boundary_ratio": 0.875}
    for part in ("transformer", "transformer_2"):
        index[part] = ["diffusers", "WanTransformer3DModel"]
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(a14b))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    words = ["plan", "--teacher", str(tmp_path), "--t-star=1", "--lr-warmup=0", "--batch-size=8", "--devices=8"]
    assert commands.main([*words, "--optimizer-name=adamw", "--parallel=fsdp"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    of = {row[0]: float(row[1]) * 2**30 * 8 / 4 for row in rows if row[:1] in (["average"], ["optimizer"], ["weights"])}
    assert of["average"] == pytest.approx(14.3e9, rel=0.01)  # the generator is one of the networks
    assert of["optimizer"] == pytest.approx(2 * (14.3e9 + 28.6e9), rel=0.01)  # two moments of generator and fake score
    assert of["weights"] == pytest.approx(14.3e9 + 28.6e9 + 28.6e9, rel=0.01)
