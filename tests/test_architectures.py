"""Each architecture of diffusers: our teacher returns what the stock pipeline computes, guidance included."""

import functools
import inspect
import json
import re
import unittest.mock
import warnings
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from emd_fast import EMDConfig, EMDTrainer, Generator, distributed, fuse
from emd_fast.config import ConfigError
from emd_fast.diffusion import ragged
from emd_fast.export.pipeline import export, load
from emd_fast.run.work import Work

diffusers = pytest.importorskip("diffusers")

import architectures  # noqa: E402
import tiny_architectures  # noqa: E402

from emd_fast.teachers import diffusers as teachers  # noqa: E402
from emd_fast.teachers.diffusers.architectures import ARCHITECTURES, file_of  # noqa: E402
from emd_fast.train import conditions  # noqa: E402

STEPS = 3
TEACHERS = Path(__file__).resolve().parents[1] / "docs" / "teachers.md"
KNOWN_ELSEWHERE = {"UNet2DModel", "DiTTransformer2DModel"}  # in test_diffusers_export.py


def pipeline_of(row, **text):
    kind = getattr(diffusers, row.pipeline)
    parts = {name: None for name in inspect.signature(kind).parameters if name not in ("boundary_ratio",)}
    parts |= {"scheduler": row.scheduler(), "vae": row.vae(), **row.parts, **text}
    component = "unet" if "unet" in parts else "transformer"
    parts[component] = tiny_architectures.seeded(row.model)
    plain = {name: p.default for name, p in inspect.signature(kind).parameters.items() if type(p.default) is bool}
    made = kind(**{**plain, **parts})
    made.set_progress_bar_config(disable=True)
    return made


def run(pipeline, row, arguments, output_type="latent", steps=STEPS):
    size = {name if name != "frames" else "num_frames": side for name, side in row.size.items()}
    options = {"num_inference_steps": steps, "output_type": output_type, "return_dict": False}
    return pipeline(**arguments, **size, **options, generator=torch.Generator().manual_seed(1))[0]


def sampled(pipeline, row, arguments, **options):
    """What the scheduler gets and returns in each step, output, time, latents, next latents; calls of the network."""
    found, calls = [], []
    step = pipeline.scheduler.step

    def recorded(output, time, latents, *args, **kwargs):
        i = len(found)
        t = pipeline.scheduler.sigmas[i] if hasattr(pipeline.scheduler, "sigmas") else time
        stepped = step(output, time, latents, *args, **kwargs)
        found.append((output.clone(), t, latents.clone(), stepped[0]))
        return stepped

    networks = [getattr(pipeline, name, None) for name in ("unet", "transformer", "transformer_2")]
    hooks = [
        network.register_forward_hook(lambda _, args, kwargs, output: calls.append(kwargs), with_kwargs=True)
        for network in networks
        if network is not None
    ]
    pipeline.scheduler.step = recorded
    try:
        run(pipeline, row, arguments, **options)
    finally:
        for hook in hooks:
            hook.remove()
        pipeline.scheduler.step = step
    return found, calls


CASES = [
    (name, guided) for name, row in architectures.ROWS.items() for guided in (False, True)[: 2 - (not row.guidance)]
]


@pytest.mark.parametrize(("name", "guided"), CASES)
def test_outputs_are_those_of_the_stock_pipeline(tmp_path, name, guided):
    row = architectures.ROWS[name]
    pipeline = pipeline_of(row)
    pipeline.save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    cond, null = row.cond(architectures.LENGTHS), row.cond(row.null)
    teacher.null_cond = null
    found, calls = sampled(pipeline, row, row.call(cond, null if guided else None))
    assert len(found) == STEPS and len(calls) >= STEPS
    for output, time, latents, _ in found:
        x, theirs = row.latents(pipeline, latents).float(), row.latents(pipeline, output).float()
        assert x.shape[1:] == teacher.sample_shape
        t = time if teacher.parametrization == "flow" else torch.tensor(teacher.time(time.item()))
        with torch.no_grad():
            ours = teacher.guided(x, t.float().expand(len(x)), cond, row.guidance if guided else None)
            largest = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("name", architectures.ROWS)
def test_latents_are_decoded_as_by_the_stock_pipeline(tmp_path, name):
    row = architectures.ROWS[name]
    pipeline = pipeline_of(row)
    pipeline.save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    teacher.folder.check(teacher.channels)
    arguments = row.call(row.cond(architectures.LENGTHS), None)
    found, _ = sampled(pipeline, row, arguments)
    ours, theirs = teacher.decode(row.latents(pipeline, found[-1][-1])) / 2 + 0.5, run(pipeline, row, arguments, "pt")
    if ours.dim() == 5:
        ours = ours.transpose(1, 2)  # videos of pipelines are (B, F, 3, H, W)
    assert ours.shape[-2:] == (row.size["height"], row.size["width"])
    assert ((ours > 0) & (ours < 1)).double().mean() > 0.2 and ours.std() > 1e-3  # else nothing is compared
    torch.testing.assert_close(ours.clamp(0, 1), theirs, rtol=0, atol=1e-5)


WITH_TEXT = [name for name, row in architectures.ROWS.items() if row.text is not None]


@pytest.mark.parametrize("name", WITH_TEXT)
def test_prompts_are_encoded_as_by_the_stock_pipeline(tmp_path, name):
    row = architectures.ROWS[name]
    pipeline = pipeline_of(row, **row.text())
    pipeline.save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    prompts = ["a b c d", "e"]
    asked = {key: value for key, value in row.call(row.cond((5, 3)), None).items() if "prompt" not in key}
    if "guidance" in teacher.takes.tensors:
        asked.pop("guidance_scale")  # the default of both
    ((output, time, latents, _), *_), _ = sampled(pipeline, row, {**asked, "prompt": list(prompts)})
    encoder = teacher.text_encoder()
    cond = encoder(prompts)
    tokens = (cond["prompt_embeds"] if isinstance(cond, dict) else cond).shape[1]
    assert tokens == teacher.network.architecture.text_tokens()
    x, theirs = row.latents(pipeline, latents).float(), row.latents(pipeline, output).float()
    t = time if teacher.parametrization == "flow" else torch.tensor(teacher.time(time.item()))
    with torch.no_grad():
        ours = teacher(x, t.float().expand(2), cond)
        swapped = teacher(x, t.float().expand(2), encoder(prompts[::-1]))
    torch.testing.assert_close(ours, theirs[:, : x.shape[1]], rtol=0, atol=1e-5 * theirs.abs().max().item())
    assert not torch.allclose(swapped, ours, rtol=0, atol=1e-4)
    assert encoder.truncated(["a", "b " * 3000]) == 1


OF_TOKENS = ("prompt_embeds", "prompt_mask")
MASKED = [name for name, row in architectures.ROWS.items() if "prompt_mask" in architectures.names_of(row)]


@pytest.mark.parametrize("name", MASKED)
def test_padding_changes_nothing_and_a_table_leaves_it_out(tmp_path, name):
    row = architectures.ROWS[name]
    pipeline_of(row).save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    cond, null = row.cond(architectures.LENGTHS), tree_map(lambda leaf: leaf[:1], row.cond((2, 2)))
    longer = {n: ragged.padded(v, 160) if n in OF_TOKENS else v for n, v in cond.items()}
    x, t = torch.randn(2, *teacher.sample_shape), torch.tensor([0.3, 0.8])
    ours = teacher(x, t, cond)
    longer["prompt_embeds"][~longer["prompt_mask"]] = 7.0
    close = {"rtol": 0, "atol": 2e-5 * ours.abs().max().item()}
    torch.testing.assert_close(teacher(x, t, longer), ours, **close)
    padded_null = {n: ragged.padded(v, 160) if n in OF_TOKENS else v for n, v in null.items()}
    conditions.save(tmp_path / "table", longer, padded_null)
    table = conditions.Mapped(tmp_path / "table")
    for rows in (table, conditions.InMemory(longer)):
        read = rows[torch.tensor([1, 0])]
        assert read["prompt_embeds"].shape[1] == read["prompt_mask"].shape[1] == 64
        torch.testing.assert_close(teacher(x.flip(0), t.flip(0), read).flip(0), ours, **close)
    teacher.null_cond = null
    guided = teacher.guided(x, t, cond, 3.0)
    teacher.null_cond = table.null_cond
    assert table.null_cond["prompt_mask"].shape == (1, 64)
    torch.testing.assert_close(teacher.guided(x, t, cond, 3.0), guided, rtol=0, atol=1e-4 * guided.abs().max().item())


@pytest.mark.parametrize("name", architectures.ROWS)
def test_every_input_counts_and_weights_in_bfloat16_give_the_same_to_their_rounding(tmp_path, name):
    row = architectures.ROWS[name]
    pipeline_of(row).save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    cond, x = row.cond(architectures.LENGTHS), torch.randn(2, *teacher.sample_shape)
    t = teacher.heard(torch.tensor([0.3, 0.7]), torch.bfloat16)
    plain = teacher(x, t, cond)
    least = 1e-4 * plain.norm()
    assert (teacher(x, t * 0.9, cond) - plain).norm() > least
    for key, value in cond.items() if isinstance(cond, dict) else ():
        changed = torch.arange(value.numel()).reshape(value.shape) != 2 if key == "prompt_mask" else value * 1.5 + 0.5
        other = {**cond, key: changed}
        assert (teacher(x, t, other) - plain).norm() > least, key
    reduced = teachers.load(tmp_path / "teacher", dtype=torch.bfloat16, **row.size)(x, t, cond)
    # An embedded guidance is rounded too, and its embedding has high frequencies.
    assert (reduced.float() - plain).norm() < (0.1 if "guidance" in teacher.takes.tensors else 0.03) * plain.norm()


def trained(teacher, row, steps=2, **changes):
    cond = row.cond(architectures.LENGTHS)
    if row.guidance:
        teacher.null_cond = {**null} if isinstance(null := row.cond(row.null), dict) else null
        teacher.null_cond = tree_map(lambda leaf: leaf[:1], teacher.null_cond)
    options = {"t_star": 1.0, "input_scale": 1.0, "guidance": row.guidance, "generator_lr": 1e-2, "batch_size": 2}
    config = EMDConfig(steps=max(steps, 1), langevin_steps=2, fake_score_updates=1, **{**options, **changes})
    trainer = EMDTrainer(teacher, config, prompts=cond)
    for _ in range(steps):
        metrics = trainer.step()
        assert all(value.isfinite() for value in metrics.values()) and metrics["skipped"] == 0
    return trainer


EXPORTED = [(name, 1.0) for name in architectures.ROWS] + [("UNet2DConditionModel, XL", None)]


@pytest.mark.parametrize(("name", "scale"), EXPORTED)
def test_a_distilled_generator_is_exported_and_samples_in_the_stock_pipeline(tmp_path, name, scale):
    row = architectures.ROWS[name]
    pipeline = pipeline_of(row)
    pipeline.save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    trainer = trained(teacher, row, input_scale=scale)
    cond = row.cond(architectures.LENGTHS)
    before = teacher.guided(z := torch.randn(2, *teacher.sample_shape), torch.ones(2), cond, None)
    assert not torch.equal(trainer.generator.denoiser.guided(z, torch.ones(2), cond, None), before)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        path = export(trainer, tmp_path / "one-step")
    loaded = load(path)
    assert torch.equal(loaded.sample(2, cond), trainer.generate(2, cond))
    missing = {name: None for name, part in pipeline.components.items() if part is None}
    stock = type(pipeline).from_pretrained(path, **missing)
    stock.set_progress_bar_config(disable=True)
    found, _ = sampled(stock, row, row.call(cond, None), steps=1)
    ((_, _, noise, x),) = found
    ours = loaded(row.latents(stock, noise) / getattr(stock.scheduler, "init_noise_sigma", 1.0), cond)
    torch.testing.assert_close(ours, row.latents(stock, x), rtol=0, atol=2e-5 * ours.abs().max().item())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"])
def test_from_the_command_line(tmp_path, monkeypatch, capsys, name):
    from PIL import Image

    from emd_fast.cli import commands
    from emd_fast.reporting import video

    monkeypatch.chdir(tmp_path)
    row = architectures.ROWS[name]
    pipeline_of(row, **row.text()).save_pretrained("teacher")
    (tmp_path / "prompts.txt").write_text("a b\nc\n")
    words = ["distill", "--teacher", "teacher", "--prompts", "prompts.txt", "--out", "run", "--guidance", "3"]
    words += ["--steps=2", "--batch-size=2", "--langevin-steps=2", "--t-star=1", "--input-scale=1", "--lr-warmup=0"]
    size = [f"--{key}={value}" for key, value in row.size.items()]
    assert commands.main([*words, *size]) == 0, capsys.readouterr().err
    for source in ("run", "one-step"):
        assert commands.main(["sample", source, "-n", "2", "--prompt", "a b", "--out", f"{source}.png"]) == 0
        assert commands.main(["sample", source, "-n", "2", "--prompt", "a b", "--out", f"{source}-each"]) == 0
        clip = commands.main(["sample", source, "-n", "2", "--prompt", "a b", "--out", f"{source}.gif"])
        assert clip == (0 if "frames" in row.size else 2)
        if source == "run":
            capsys.readouterr()
            assert commands.main(["export", "run", "one-step"]) == 0
            lines = capsys.readouterr().err.partition("diffusers samples it with these lines:\n")[2]
    assert (tmp_path / "run.png").read_bytes() == (tmp_path / "one-step.png").read_bytes()
    (tmp_path / "run" / "samples" / "generator.png").stat()
    if "frames" in row.size:
        clip = Image.open(tmp_path / "run.gif")
        assert clip.n_frames == row.size["frames"] and clip.size == (2 * 98 + 2, 64 + 4)  # side by side
        ending = video.ending()
        assert {path.suffix for path in (tmp_path / "run-each").iterdir()} == {ending}
        assert f"[video](samples/generator{ending})" in (tmp_path / "run" / "report.md").read_text()
        (tmp_path / "run" / "samples" / f"generator{ending}").stat()
    else:
        assert Image.open(next((tmp_path / "run-each").iterdir())).size == (96, 64)
    torch.manual_seed(0)
    exec(lines.replace("a cat", "a b"), found := {})
    frame = (
        found["made"] if row.size.get("frames") is None else Image.fromarray((found["made"][0] * 255).astype("uint8"))
    )
    assert frame.size == (96, 64) and len(lines.splitlines()) == 3
    capsys.readouterr()
    wrong = {"--height=60": "height must be a multiple of 16", "--width=1": "width must be a multiple of 16"}
    wrong |= {"--frames=7": "frames must be 1 + a multiple of 4" if "frames" in row.size else "leave frames out"}
    for option, said in wrong.items():
        assert commands.main([*words, *size, option, "--out", "other"]) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.strip().splitlines()) == 1, error


TIMED = {  # where a network gets its time, and by how much that is larger than t
    "FluxTransformer2DModel": ("time_text_embed.time_proj", 1000),
    "Flux2Transformer2DModel": ("time_guidance_embed.time_proj", 1000),
    "ChromaTransformer2DModel": ("time_text_embed.time_proj", 1000),
    "QwenImageTransformer2DModel": ("time_text_embed.time_proj", 1),
    "ZImageTransformer2DModel": ("t_embedder", None),
    "WanTransformer3DModel": ("condition_embedder.timesteps_proj", 1000),
}


@pytest.mark.parametrize("name", TIMED)
def test_alpha_and_sigma_are_of_the_time_that_the_network_hears_in_bfloat16(tmp_path, name):
    row, (path, scale) = architectures.ROWS[name], TIMED[name]
    pipeline_of(row).save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    trainer = trained(teacher, row, steps=0, precision="bfloat16", t_star=0.9, guidance=None)
    heard = []
    for network in (trainer.teacher, trainer.fake_score, trainer.generator.denoiser):
        module = network.network.model.get_submodule(path)
        module.register_forward_hook(lambda module, args, output: heard.append(args[0].float()))
    posterior = trainer.sample_posterior()
    times = [trainer.generator.t_star, *posterior.t.tolist()]
    told = {round(t, 6) for t in torch.cat(heard).div(scale or 1000).tolist() if t < 2}  # guidance is heard there too
    if scale is None:
        told = {round(1 - t, 6) for t in told}
    assert told == {round(t, 6) for t in times}
    torch.testing.assert_close(posterior.sigma, posterior.t, rtol=0, atol=0)
    drawn = trained(teacher, row, steps=0, guidance=None).sample_posterior().t
    assert torch.equal(drawn, posterior.t) == (name[:4] in ("ZIma", "WanT"))  # rounded where the network rounds


SHIFTED = [
    ("FluxTransformer2DModel", "linear"),
    *((f"{name}Transformer2DModel", "exponential") for name in ("Flux", "Chroma", "QwenImage", "ZImage")),
    ("LTXVideoTransformer3DModel", "exponential"),
    ("Lumina2Transformer2DModel", "exponential"),
]


@pytest.mark.parametrize(("name", "kind"), SHIFTED)
def test_a_dynamic_shift_of_times_is_that_of_the_stock_pipeline(tmp_path, name, kind):
    row = architectures.ROWS[name]
    pipeline = pipeline_of(row)
    numbers = {"base_shift": 0.3, "max_shift": 0.9, "base_image_seq_len": 16, "max_image_seq_len": 64}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, **numbers)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(tmp_path / "teacher")
    with unittest.mock.patch.object(scheduler, "time_shift", wraps=scheduler.time_shift) as shifted:
        run(pipeline, row, row.call(row.cond(architectures.LENGTHS), None))
    uniform = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    theirs = scheduler.time_shift(*shifted.call_args.args[:2], uniform)
    shift = teachers.load(tmp_path / "teacher", **row.size).shift
    torch.testing.assert_close(shift * uniform / (1 + (shift - 1) * uniform), theirs, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [64, 2048])  # below and above 4300 tokens, where the pipeline changes its formula
@pytest.mark.parametrize("name", ["Flux2Transformer2DModel", "Flux2Transformer2DModel, klein"])
def test_the_dynamic_shift_of_flux_2_is_that_of_its_pipeline_with_its_usual_steps(tmp_path, name, size):
    row = architectures.ROWS[name]
    pipeline = pipeline_of(row)
    pipeline.save_pretrained(tmp_path / "teacher")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    module = inspect.getmodule(type(pipeline))
    steps = inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default
    tokens = (size // 16) ** 2
    scheduler.set_timesteps(sigmas=[0.9, 0.4, 0.1], mu=module.compute_empirical_mu(tokens, steps))
    shift = teachers.load(tmp_path / "teacher", scheduler=scheduler, height=size, width=size).shift
    uniform = torch.tensor([0.9, 0.4, 0.1])
    torch.testing.assert_close(shift * uniform / (1 + (shift - 1) * uniform), scheduler.sigmas[:3], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "LTXVideoTransformer3DModel"])
def test_a_terminal_time_of_the_scheduler_changes_no_shift(tmp_path, name):
    row = architectures.ROWS[name]
    pipeline_of(row).save_pretrained(tmp_path / "teacher")
    found, times = [], []
    for terminal in (None, 0.1):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=terminal)
        found.append(teachers.load(tmp_path / "teacher", scheduler=scheduler, **row.size).shift)
        for steps in (10, 50):
            scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)], mu=1.0)
            times.append(scheduler.sigmas[steps // 2].item())
    assert found[0] == found[1] and times[0] == pytest.approx(times[1])
    assert abs(times[2] - times[3]) > 0.05  # the stretch of the scheduler depends on the number of its steps


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("FluxTransformer2DModel", {"in_channels": 32, "out_channels": 16}, "not inpainting or image to video"),
        ("WanTransformer3DModel", {"image_dim": 8}, "image_dim = 8 is not supported: a text-to-video network is"),
        ("QwenImageTransformer2DModel", {"use_additional_t_cond": True}, "a text-to-image network is"),
        ("CogVideoXTransformer3DModel", {"ofs_embed_dim": 8}, "a text-to-video network is"),
        ("SanaTransformer2DModel", {"guidance_embeds": True}, "a network of SanaPipeline is"),
    ],
)
def test_networks_with_other_inputs_are_refused(name, changes, said):
    config = {**architectures.ROWS[name].model().config, **changes}
    with pytest.raises(ConfigError, match=said) as error:
        ARCHITECTURES[name](config).check_channels()
    assert "\n" not in str(error.value)


def test_sizes_and_conditions_that_do_not_fit(tmp_path):
    flux, wan = (architectures.ROWS[name] for name in ("FluxTransformer2DModel", "WanTransformer3DModel, 2.2 5B"))
    for name, row in (("flux", flux), ("wan", wan)):
        pipeline_of(row).save_pretrained(tmp_path / name)
    for name, size, said in [
        (
            "flux",
            {"height": 100, "width": 96},
            "height must be a multiple of 16 for this FluxTransformer2DModel, got 100",
        ),
        ("flux", {"frames": 5}, "makes images: leave frames out"),
        ("flux", {"sample_shape": (4, 8, 9)}, "in whole patches"),
        ("flux", {"sample_shape": (4, 8, 8), "height": 64}, "leave one of them out"),
        ("wan", {"frames": 8}, "frames must be 1 + a multiple of 4 for this WanTransformer3DModel, got 8: give 9"),
        ("wan", {"embedded_guidance": 3.0}, "has no embedded guidance"),
    ]:
        with pytest.raises(ConfigError, match=re.escape(said)):
            teachers.load(tmp_path / name, **size)
    assert teachers.load(tmp_path / "flux").sample_shape == (4, 128, 128)  # the default of the pipeline
    assert teachers.load(tmp_path / "wan").sample_shape == (4, 21, 60, 104)
    teacher = teachers.load(tmp_path / "flux", **flux.size)
    cond = flux.cond((5, 3))
    x, t = torch.randn(2, *teacher.sample_shape), torch.ones(2)
    for wrong in ({**cond, "guidance": cond["guidance"][:1]}, {n: v for n, v in cond.items() if n != "guidance"}):
        with pytest.raises(ValueError, match="takes a dict of prompt_embeds, pooled_projections, guidance"):
            teacher(x, t, wrong)


@pytest.mark.parametrize("name", architectures.ROWS)
def test_repeated_blocks_are_compiled_without_a_graph_break_or_a_recompilation(tmp_path, name):
    row = architectures.ROWS[name]
    pipeline_of(row).save_pretrained(tmp_path / "teacher")
    teacher = teachers.load(tmp_path / "teacher", **row.size)
    cond, x, t = row.cond(architectures.LENGTHS), torch.randn(2, *teacher.sample_shape), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        plain = teacher(x, t, cond)
        torch._dynamo.reset()  # rows of one class share what is compiled
        counters.clear()
        fuse(teacher, compile={"backend": "eager", "fullgraph": True})
        ours = teacher(x, t, cond)
        assert counters["stats"]["unique_graphs"] > 0
        with torch._dynamo.config.patch(error_on_recompile=True):
            teacher(x + 1, t * 0.9, cond)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5 * plain.abs().max().item())
    inside = {type(part).__name__ for block in distributed.blocks_of(teacher) for part in block.modules()}
    assert inside >= {kind for kind in teacher.network.model._repeated_blocks or () if "Block" in kind}


def a_step(folder, name, **changes):
    """A training step on this rank's share; the same numbers on every rank."""
    row = architectures.ROWS[name]
    trainer = trained(teachers.load(folder, **row.size), row, steps=0, **changes)
    metrics = {key: value.item() for key, value in trainer.step().items()}
    return metrics, trainer.generate(2, row.cond(architectures.LENGTHS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["QwenImageTransformer2DModel", "WanTransformer3DModel"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_ranks_that_shard_the_networks_do_what_one_does(tmp_path, ranks, name, precision):
    pipeline_of(architectures.ROWS[name]).save_pretrained(tmp_path / "teacher")
    options = {"precision": precision, "micro_batch_size": 1}
    metrics, samples = a_step(tmp_path / "teacher", name, **options)
    # Rounding of bfloat16 goes through a Langevin step and an update.
    bound = 1e-4 if precision == "float32" else 0.05
    for theirs, drawn in ranks(2, functools.partial(a_step, parallel="fsdp", **options), tmp_path / "teacher", name):
        for key, value in metrics.items():
            assert theirs[key] == pytest.approx(value, rel=bound, abs=1e-7), key
        torch.testing.assert_close(drawn, samples, rtol=0, atol=bound * samples.abs().max().item())


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
    "transformer_layers_per_block": [1, 2, 10],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}
BASE = {"attention_head_dim": 128, "num_attention_heads": 24}
PUBLISHED = {  # class, what its published config.json has, parameters in thousand millions
    "SDXL": ("UNet2DConditionModel", XL, 2.567),
    "Flux.1 dev": ("FluxTransformer2DModel", {**BASE, "num_layers": 19, "guidance_embeds": True}, 11.9),
    "Qwen-Image": ("QwenImageTransformer2DModel", {**BASE, "num_layers": 60, "joint_attention_dim": 3584}, 20.4),
    "Wan 2.1 14B": ("WanTransformer3DModel", {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}, 14.3),
    "Wan 2.1 1.3B": ("WanTransformer3DModel", {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1.42),
    "Flux.2 dev": ("Flux2Transformer2DModel", {"num_layers": 8, "num_single_layers": 48}, 32.2),
    "Z-Image": ("ZImageTransformer2DModel", {"dim": 3840, "n_layers": 30}, 6.15),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {**BASE, "num_single_layers": 40}, 12.8),
    "CogVideoX 5B": ("CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}, 5.57),
    "LTX-Video": ("LTXVideoTransformer3DModel", {"num_layers": 28}, 1.92),
    "Sana 1.6B": ("SanaTransformer2DModel", {"num_layers": 20}, 1.60),
    "Lumina 2": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, 2.61),
    "Chroma": ("ChromaTransformer2DModel", {"num_layers": 19, "num_single_layers": 38}, 8.9),
}


@pytest.mark.parametrize("name", architectures.ROWS)
def test_the_operations_of_a_pass_are_counted_for_the_longest_text(tmp_path, name):
    row = architectures.ROWS[name]
    pipeline_of(row).save_pretrained(tmp_path / "teacher")
    planned, teacher = (teachers.load(tmp_path / "teacher", device=where, **row.size) for where in ("meta", "cpu"))
    work = Work.of(planned, Generator(planned, 1.0), planned)
    assert work.teacher == work.generator == work.fake_score
    cond = tree_map(lambda leaf: torch.ones(leaf.shape, dtype=leaf.dtype), teacher.blank_condition())
    # The counter does not know the CPU's own attention.
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counted:
        teacher(torch.zeros(1, *teacher.sample_shape), torch.ones(1), cond)
    assert work.teacher == pytest.approx(counted.get_total_flops(), rel=0.01)


@pytest.mark.slow  # building the modules of the largest takes seconds
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_plan_of_a_published_configuration_has_its_parameters(tmp_path, capsys, name):
    from emd_fast.cli import commands

    kind, config, published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind, **config}))
    words = ["plan", "--teacher", str(tmp_path), "--t-star=1", "--lr-warmup=0", "--batch-size=8", "--devices=8"]
    words += ["--optimizer-name=adamw", "--parallel=fsdp", *(["--t-star=0.5"] if kind.startswith("UNet") else [])]
    words += ["--tflops=1000", "--gb-per-second=400"]
    assert commands.main(words) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    (row,) = (line.split() for line in out.splitlines() if line.startswith("average"))
    # A float32 average of the generator, over eight devices.
    parameters = float(row[1]) * 2**30 * 8 / 4 if "GiB" in out else float(row[1]) * 2**20 * 8 / 4
    assert parameters == pytest.approx(published * 1e9, rel=0.01)
    (row,) = (line.split() for line in out.splitlines() if line.startswith("computing"))
    assert 0 < float(row[2]) < 10000


def test_every_architecture_has_a_row_and_a_file_of_its_name():
    assert {name.partition(",")[0] for name in architectures.ROWS} | KNOWN_ELSEWHERE == set(ARCHITECTURES)
    for name, kind in ARCHITECTURES.items():
        path = inspect.getfile(kind)
        assert path.endswith(f"/{file_of(name)}")
        with open(path) as file:
            assert len(file.readlines()) < 80
        assert f"\n| `{name}` |" in TEACHERS.read_text()
