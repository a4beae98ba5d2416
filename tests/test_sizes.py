"""Runs of several sizes: the size of a step, conditions that state it, resume, replay, ranks, compile, commands."""

import dataclasses
import functools
import itertools
import re
import unittest.mock

import pytest
import torch
from helpers import assert_same
from helpers import integers as plainly_drawn
from torch._dynamo.utils import counters

from emd_fast import Denoiser, EMDConfig, EMDTrainer, Generator, fuse, schedules
from emd_fast.config import ConfigError, TimeDistribution
from emd_fast.export import export
from emd_fast.export import load as load_exported
from emd_fast.fusion import compiled_blocks
from emd_fast.run.work import Work
from emd_fast.teachers.mlp import TimeMLP
from emd_fast.train.checkpoint import CheckpointError

diffusers = pytest.importorskip("diffusers")

import architectures  # noqa: E402
from test_architectures import pipeline_of, trained  # noqa: E402

from emd_fast.teachers import diffusers as teachers  # noqa: E402

XL, FLUX, QWEN, WAN = (
    name if name.endswith("XL") else f"{name}Model"
    for name in ("UNet2DConditionModel, XL", "FluxTransformer2D", "QwenImageTransformer2D", "WanTransformer3D")
)
ALPHA = "PixArtTransformer2DModel, alpha"
SIZES = {name: [[64, 96], [96, 64], [64, 64]] for name in architectures.ROWS} | {WAN: [[64, 96, 9], [96, 64, 9]]}
BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}  # rounding goes through three updates by AdamW
SEED = 11  # the first three steps of two sizes and of three have not all one size


@pytest.fixture
def folder(tmp_path):
    def made(name, **parts):
        pipeline_of(architectures.ROWS[name], **parts).save_pretrained(tmp_path / "teacher")
        return tmp_path / "teacher"

    return made


def several(path, name, *, n=2, steps=0, sizes=None, **changes):
    teacher = teachers.load(path, sizes=sizes or SIZES[name][:n])
    return trained(teacher, architectures.ROWS[name], steps, seed=SEED, **changes)


def drawn(trainer, steps):
    """Shapes of the samples of these steps."""
    found = []
    for step in steps:
        trainer.batches.at(step)
        found.append(trainer.batches.sizes.shape.sample)
    return found


def test_the_size_of_a_step_is_that_of_the_noise_contract(folder):
    trainer = several(folder(FLUX), FLUX, n=3)
    shapes = [(4, height // 8, width // 8) for height, width in SIZES[FLUX]]
    assert trainer.teacher.sample_shapes == tuple(shapes)
    expected = [shapes[plainly_drawn(3, (1,), seed=SEED, step=step, stream=16).item()] for step in range(40)]
    assert drawn(trainer, range(40)) == expected and set(expected) == set(shapes)
    one = teachers.load(trainer.teacher.folder.root, sizes=SIZES[FLUX][:1])
    assert one.sample_shapes == (shapes[0],)


@pytest.mark.parametrize("name", [XL, WAN])
def test_one_size_is_height_and_width_bit_for_bit(folder, name):
    path, row = folder(name), architectures.ROWS[name]
    found = []
    for size in (row.size, {"sizes": [list(row.size.values())]}):
        trainer = trained(teachers.load(path, **size), row, steps=2, seed=SEED)
        found.append([*trainer.step().values(), trainer.generate(2)])
    for ours, theirs in zip(*found, strict=True):
        assert_same(ours, theirs)


def calls_of(trainer):
    """Shapes and conditions of all passes of the three networks from now on."""
    calls = []
    for network in (trainer.teacher, trainer.fake_score, trainer.generator.denoiser):
        network.network.register_forward_hook(lambda _, args, output: calls.append((tuple(args[0].shape[1:]), args[2])))
    return calls


@pytest.mark.parametrize(("name", "key"), [(XL, "time_ids"), (ALPHA, "resolution"), (WAN, None)])
def test_all_passes_of_a_step_have_its_size_and_are_told_it(folder, name, key):
    trainer = several(folder(name), name)
    calls, seen = calls_of(trainer), set()
    for step in range(6):
        calls.clear()
        trainer.step()
        (shape,) = {shape for shape, _ in calls}
        assert shape == drawn(trainer, [step])[0] and len(calls) == 9  # K = 2, guided in one pass
        height, width = (8 * side for side in shape[-2:])
        stated = {"time_ids": [height, width, 0, 0, height, width], "resolution": [height, width]}
        for _, cond in calls if key else ():
            assert cond[key].tolist() == [stated[key]] * len(cond[key])
            if key == "resolution":
                assert cond["aspect_ratio"].flatten().tolist() == pytest.approx([height / width] * len(cond[key]))
        seen.add(shape)
    assert len(seen) == 2
    calls.clear()
    assert trainer.generate(2).shape[1:] == trainer.sample_shape == trainer.teacher.sample_shapes[0]


def test_the_null_condition_of_an_e_step_as_a_graph_is_that_of_the_step(folder):
    path = folder(XL)
    plain, graphed = (several(path, XL, cuda_graph=graph) for graph in (False, True))
    for step in range(4):
        assert_same(graphed.sample_posterior(step=step).drift, plain.sample_posterior(step=step).drift)
    assert len(graphed.posterior._graphed) == 2


def test_conditions_of_a_run_of_one_size_stay_as_they_were_given(folder):
    row = architectures.ROWS[XL]
    cropped = {**row.cond(architectures.LENGTHS), "time_ids": torch.arange(12.0).reshape(2, 6)}
    trainer = trained(teachers.load(folder(XL), **row.size), row, 0)
    calls = calls_of(trainer)
    trainer.step(cropped)
    trainer.generate(2, cropped)
    assert {tuple(row) for _, cond in calls for row in cond["time_ids"].tolist()} >= {(0, 1, 2, 3, 4, 5)}
    assert all(cond["time_ids"][1].tolist() == [6, 7, 8, 9, 10, 11] for _, cond in calls if len(cond["time_ids"]) == 2)


def test_samples_of_any_size_are_those_of_a_teacher_of_that_size(folder, tmp_path):
    path = folder(XL)
    trainer = several(path, XL, steps=2, ema=0.0)
    shape = trainer.teacher.resized(height=64, width=32)
    assert shape == (4, 8, 4) and trainer.teacher.resized(width=32) == shape
    trainer.save(tmp_path / "checkpoint")
    one = teachers.load(path, height=64, width=32)
    cond = architectures.ROWS[XL].cond(architectures.LENGTHS)
    small = torch.tensor([[64.0, 32, 0, 0, 64, 32]]).repeat(2, 1)
    resized = EMDTrainer.resume(tmp_path / "checkpoint", one, trains=False)
    expected = resized.generate(2, {**cond, "time_ids": small})
    assert_same(trainer.generate(2, cond, shape=shape), expected)
    assert_same(trainer.generate(2, shape=shape), expected)  # the prompts in turn
    made = load_exported(export(trainer, tmp_path / "one-step", "diffusers"))
    assert made.sample_shape == (4, 8, 12) and made.resized(width=32) == shape
    assert_same(made.sample(2, cond, shape=shape), expected)
    with pytest.raises(ConfigError, match="width must be a multiple of 8"):
        trainer.teacher.resized(width=33)


def test_a_run_goes_on_and_is_replayed_with_the_sizes_that_it_had(folder, tmp_path):
    path, row = folder(WAN), architectures.ROWS[WAN]
    whole = several(path, WAN, steps=1)
    whole.save(tmp_path / "checkpoint")
    after = [whole.step() for _ in range(3)]
    prompts = row.cond(architectures.LENGTHS)

    def resumed(**size):
        teacher = teachers.load(path, **size)
        teacher.null_cond = whole.teacher.null_cond
        return EMDTrainer.resume(tmp_path / "checkpoint", teacher, prompts=prompts)

    again = resumed(sizes=SIZES[WAN])
    replayed = again.sample_posterior(step=3, samples=range(1, 2))
    assert replayed.z.shape[1:] == drawn(whole, [3])[0]
    for metrics in after:
        assert {name: value.item() for name, value in again.step().items()} == {
            name: value.item() for name, value in metrics.items()
        }
    assert_same(again.generate(2), whole.generate(2))
    for other in ({"sizes": SIZES[WAN][::-1]}, row.size):
        with pytest.raises(CheckpointError, match=r"was made with samples of the shapes .*: give the teacher the same"):
            resumed(**other)


@pytest.mark.parametrize("changes", [{"rungs": 2}, {"adapter_rank": 2}, {"adapter_rank": 2, "score_passes": "joint"}])
def test_micro_batches_of_rungs_and_adapters_have_the_size_of_the_step(folder, changes):
    if "adapter_rank" in changes:
        pytest.importorskip("peft")
    path, found = folder(XL), []
    for size in (1, 2):
        trainer = several(path, XL, t_star=0.9, micro_batch_size=size, generator_lr=1e-3, **changes)
        found.append([{name: value.item() for name, value in trainer.step().items()} for _ in range(3)])
        assert len(set(drawn(trainer, range(3)))) == 2
    for ours, theirs in zip(*found, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-6)


def test_a_dynamic_shift_of_times_is_that_of_the_size(folder):
    path = folder(
        FLUX, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4)
    )
    times = {"time_distribution": {"kind": "shifted"}}
    trainer = several(path, FLUX, n=3, **times)
    shifts = trainer.config.time_distribution.shift
    by_hand = [teachers.load(path, height=height, width=width).shift for height, width in SIZES[FLUX]]
    assert shifts == by_hand and len(set(shifts)) == 2
    for step in range(8):
        posterior = trainer.sample_posterior(step=step)
        shift = shifts[trainer.teacher.sample_shapes.index(tuple(posterior.z.shape[1:]))]
        one = several(path, FLUX, sizes=SIZES[FLUX][:1], time_distribution={"kind": "shifted", "shift": shift})
        assert_same(one.sample_posterior(step=step).t, posterior.t)
    fixed = several(path, FLUX, time_distribution={"kind": "shifted", "shift": [2.0, 3.0]})
    assert fixed.config.time_distribution.shift == [2.0, 3.0]
    assert several(folder(FLUX), FLUX, **times).config.time_distribution.shift == 3.0
    with pytest.raises(ConfigError, match="must have one shift, or one for each of 3 sizes"):
        several(path, FLUX, n=3, time_distribution={"kind": "shifted", "shift": [2.0, 3.0]})


def test_a_run_of_several_shifts_says_which_sizes_it_has(folder, tmp_path):
    path = folder(
        FLUX, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4)
    )
    trainer = several(path, FLUX, sizes=[[64, 64], [64, 96]], time_distribution={"kind": "shifted"})
    trainer.save(tmp_path / "checkpoint")
    given = dataclasses.replace(trainer.config, time_distribution=TimeDistribution(kind="shifted"))
    one = teachers.load(path, sizes=[[64, 64]])
    said = r"was made with samples of the shapes \[\[4, 8, 8\], \[4, 8, 12\]\], not of one shape: give the teacher"
    for options in ({}, {"config": given}, {"trains": False}):
        with pytest.raises(CheckpointError, match=said):
            EMDTrainer.resume(tmp_path / "checkpoint", one, **options)
    same = teachers.load(path, sizes=[[64, 64], [64, 96]])
    assert EMDTrainer.resume(tmp_path / "checkpoint", same, config=given).config == trainer.config


def test_networks_of_ones_own():
    teacher = Denoiser(
        TimeMLP(2, 16, 1, seed=1), schedules.RectifiedFlow(), "x0", sample_shape=(2,), other_shapes=[(3, 2)]
    )
    assert teacher.sample_shapes == ((2,), (3, 2))
    settings = EMDConfig(batch_size=2, t_star=0.5)
    generator = torch.nn.Linear(2, 2)
    generator.latent_shape = (2,)
    with pytest.raises(ValueError, match="makes samples of one size, and the teacher has"):
        EMDTrainer(teacher, settings, generator)


def test_operations_of_a_plan_are_the_mean_over_the_sizes(tmp_path):
    import diffusers_folders

    folder = diffusers_folders.unet(tmp_path)
    of = {}
    for name, size in {"both": [[16, 16], [8, 16]], "large": [[16, 16]], "small": [[8, 16]]}.items():
        teacher = teachers.load(folder, sizes=size)
        of[name] = Work.of(teacher, Generator(teacher, 0.5), teacher).teacher
    assert of["both"] == (of["large"] + of["small"]) / 2 and of["small"] < of["large"]


BAD = [
    (FLUX, {"sizes": [[64, 96], [64, 100]]}, "width must be a multiple of 16 for this FluxTransformer2DModel, got 100"),
    (FLUX, {"sizes": [[64, 96], [64, 96]]}, "sizes must differ, got [64, 96] and [64, 96]"),
    (FLUX, {"sizes": []}, "sizes has no size: give at least one, or leave sizes out"),
    (FLUX, {"sizes": [[64, 96]], "height": 64}, "sizes and height, width give the size twice"),
    (FLUX, {"sizes": [[64, 96]], "sample_shape": (4, 8, 8)}, "sample_shape and height, width, frames, sizes give"),
    (FLUX, {"sizes": [[64, 96, 9]]}, "each of sizes must be [height, width] for this FluxTransformer2DModel, got"),
    (FLUX, {"sizes": [[64]]}, "each of sizes must be [height, width] for this"),
    (FLUX, {"sizes": [[64, 96]], "frames": 9}, "makes images: leave frames out"),
    (FLUX, {"sizes": [[0, 96]]}, "height must be a multiple of 16"),
    (WAN, {"sizes": [[64, 96, 8]]}, "frames must be 1 + a multiple of 4 for this WanTransformer3DModel, got 8: give 9"),
    (WAN, {"sizes": [[64, 96], [64, 96, 9]], "frames": 9}, "sizes must differ, got [64, 96] and [64, 96, 9]"),
    (WAN, {"sizes": [[64, 96, 9]], "frames": 9}, "sizes have their own frames: leave frames out"),
    (WAN, {"sizes": [[64]]}, "each of sizes must be [height, width] or [height, width, frames]"),
]


@pytest.mark.parametrize("name", [FLUX, WAN])
def test_sizes_that_do_not_fit(folder, name):
    path = folder(name)
    for _, size, said in (row for row in BAD if row[0] == name):
        with pytest.raises(ConfigError, match=re.escape(said)) as error:
            teachers.load(path, **size)
        assert "\n" not in str(error.value)
    if name == WAN:
        mixed = teachers.load(path, sizes=[[64, 96], [64, 96, 13]], frames=9)
        assert mixed.sample_shapes == ((4, 3, 8, 12), (4, 4, 8, 12))


@pytest.mark.parametrize("name", [QWEN, WAN])
def test_blocks_are_compiled_once_for_each_size(folder, name):
    path, row, sizes = folder(name), architectures.ROWS[name], [[16 * i, 32] for i in range(1, 11)]
    teacher = teachers.load(path, sizes=sizes, frames=9 if name == WAN else None)
    cond, t = row.cond(architectures.LENGTHS), torch.tensor([0.3, 0.7])
    xs = [torch.randn(2, *shape) for shape in teacher.sample_shapes]

    def graphs(xs):
        counters.clear()
        found = [teacher(x, t, cond) for x in xs]
        return found, counters["stats"]["unique_graphs"]

    with torch.no_grad():
        plain, _ = graphs(xs)
        torch._dynamo.reset()
        fuse(teacher, compile={"backend": "eager", "fullgraph": True, "recompile_limit": 8 * len(sizes)})
        first, each = graphs(xs[:1])
        others, rest = graphs(xs[1:])
        assert each > 0 and rest == 9 * each
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert graphs([x + 1 for x in xs])[1] == 0
    for ours, theirs in zip([*first, *others], plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


def steps_of(folder, name, **changes):
    """Two training steps of two sizes on this rank's share; the same numbers on every rank."""
    trainer = several(folder, name, **changes)
    metrics = [{key: value.item() for key, value in trainer.step().items()} for _ in range(3)]
    assert len(set(drawn(trainer, range(3)))) == 2
    return metrics, [trainer.generate(2, shape=shape) for shape in trainer.teacher.sample_shapes]


def compiled_steps_of(folder, name, **changes):
    """`steps_of` with compiled blocks, without the code of Inductor, which takes minutes for their graphs."""
    compiled_blocks._compiled.cache_clear()
    counters.clear()
    with unittest.mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
        found = steps_of(folder, name, compile=True, **changes)
    assert counters["stats"]["unique_graphs"] > 0
    compiled_blocks._compiled.cache_clear()
    return found


def assert_close(found, expected, bound):
    """Metrics of the steps and samples are equal, relative to the largest."""
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert ours == pytest.approx(theirs, rel=bound, abs=1e-6)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * theirs.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", [QWEN, WAN])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_ranks_that_shard_the_networks_draw_the_same_sizes(folder, ranks, name, precision):
    path = folder(name)
    options = {"precision": precision, "micro_batch_size": 1, "generator_lr": 1e-3}
    expected = steps_of(path, name, **options)
    for found in ranks(2, functools.partial(steps_of, parallel="fsdp", **options), path, name):
        assert_close(found, expected, BOUNDS[precision])


@pytest.mark.slow
@pytest.mark.parametrize("name", [QWEN, WAN])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_compiled_blocks_of_two_sizes_train_as_plain_ones(folder, ranks, name, precision):
    path = folder(name)
    options = {"precision": precision, "generator_lr": 1e-3}
    expected = steps_of(path, name, **options)
    assert_close(compiled_steps_of(path, name, **options), expected, BOUNDS[precision])
    if precision == "float32":
        for found in ranks(2, functools.partial(compiled_steps_of, parallel="fsdp", **options), path, name):
            assert_close(found, expected, BOUNDS[precision])


@pytest.mark.slow
def test_from_the_command_line(call, refused, capsys, tmp_path):
    from PIL import Image

    row = architectures.ROWS[FLUX]
    pipeline_of(row, **row.text()).save_pretrained("teacher")
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    capsys.readouterr()  # progress bars of what was saved
    words = ["--teacher", "teacher", "--prompts", "prompts.txt", "--steps=3", "--batch-size=2", "--langevin-steps=1"]
    words += ["--t-star=1", "--input-scale=1", "--lr-warmup=0", f"--seed={SEED}"]
    sizes = ["--sizes", "[[64, 96], [96, 64]]"]
    for wrong, said in {"[[64, 96], [64, 100]]": "width must be", "[]": "has no size", "64": "sizes must be"}.items():
        refused(2, said, "distill", *words, "--sizes", wrong, "--out", "other")
    refused(2, "give the size twice", "distill", *words, *sizes, "--height=64", "--out", "other")
    assert not (tmp_path / "other" / "prompts.safetensors").exists()
    assert "sizes = [" in call("plan", *words, *sizes)[1]
    code, _, err = call("distill", *words, *sizes, "--out", "run")
    assert code == 0, err
    refused(2, "pretrained.sizes", "distill", *words, "--sizes", "[[96, 64], [64, 96]]", "--out", "run")
    assert call("export", "run", "one-step")[0] == 0
    for source, size in itertools.product(("run", "one-step"), ((96, 64), (80, 48))):
        asked = () if size == (96, 64) else ("--width=80", "--height=48")
        out = f"{source}-{size[0]}"
        code, _, err = call("sample", source, "-n", 1, "--prompt", "a b", *asked, "--out", out)
        assert code == 0, err
        assert Image.open(next((tmp_path / out).iterdir())).size == size
    refused(2, "height must be a multiple of 16", "sample", "run", "--height=50", "--out", "no.png")
    for step, shape in ((3, (1, 4, 8, 12)), (4, (1, 4, 12, 8))):
        assert call("replay", "run", "--step", step, "--sample", 0, "--out", f"replay-{step}")[0] == 0
        assert torch.load(tmp_path / f"replay-{step}" / "samples.pt")["after"].shape == shape
