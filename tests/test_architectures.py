"""Each architecture of diffusers: our teacher returns what the stock pipeline computes, guidance included."""

import inspect

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import architectures  # noqa: E402

from emd_fast.teachers import diffusers as teachers  # noqa: E402
from emd_fast.teachers.diffusers.architectures import ARCHITECTURES, file_of  # noqa: E402

STEPS = 3
KNOWN_ELSEWHERE = {"UNet2DModel", "DiTTransformer2DModel", "SD3Transformer2DModel"}  # in test_diffusers_export.py


def pipeline_of(row):
    kind = getattr(diffusers, row.pipeline)
    parts = {name: None for name in inspect.signature(kind).parameters if name not in ("boundary_ratio",)}
    parts |= {"scheduler": row.scheduler(), "vae": row.vae(), **row.parts}
    component = "unet" if "unet" in parts else "transformer"
    parts[component] = architectures.seeded(row.model)
    plain = {name: p.default for name, p in inspect.signature(kind).parameters.items() if type(p.default) is bool}
    made = kind(**{**plain, **parts})
    made.set_progress_bar_config(disable=True)
    return made


def run(pipeline, row, arguments, output_type="latent"):
    size = {name if name != "frames" else "num_frames": side for name, side in row.size.items()}
    options = {"num_inference_steps": STEPS, "output_type": output_type, "return_dict": False}
    return pipeline(**arguments, **size, **options, generator=torch.Generator().manual_seed(1))[0]


def sampled(pipeline, row, arguments):
    """What the scheduler gets and returns in each step, output, time, latents, next latents; calls of the network."""
    found, calls = [], []
    step = pipeline.scheduler.step

    def recorded(output, time, latents, *args, **kwargs):
        i = len(found)
        t = pipeline.scheduler.sigmas[i] if hasattr(pipeline.scheduler, "sigmas") else time
        stepped = step(output, time, latents, *args, **kwargs)
        found.append((output.clone(), t, latents.clone(), stepped[0]))
        return stepped

    network = getattr(pipeline, "unet", None) or pipeline.transformer
    hook = network.register_forward_hook(lambda _, args, kwargs, output: calls.append(kwargs), with_kwargs=True)
    pipeline.scheduler.step = recorded
    try:
        run(pipeline, row, arguments)
    finally:
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
            other = teacher(x, t.float().expand(len(x)), null)
        largest = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * largest)
        assert (other - theirs).abs().max() > 1e-3 * largest  # the condition counts


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


def test_every_architecture_has_a_row_and_a_file_of_its_name():
    assert {name.partition(",")[0] for name in architectures.ROWS} | KNOWN_ELSEWHERE == set(ARCHITECTURES)
    for name, kind in ARCHITECTURES.items():
        path = inspect.getfile(kind)
        assert path.endswith(f"/{file_of(name)}")
        with open(path) as file:
            assert len(file.readlines()) < 80
