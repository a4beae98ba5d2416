"""Schedulers with which stock pipelines of diffusers sample a one-step generator.

A pipeline called with one inference step draws z ~ N(0, I), gets the timestep from its scheduler
and runs the network once. The chain of betas ends at the index of t_star and has "trailing"
spacing, so that the single timestep is that index. DDIM then computes D(z; t_star), the generator
with input_scale = 1. Euler multiplies z by sigma / alpha first and divides the network's input by
sqrt(1 + sigma^2 / alpha^2), which gives D(sigma z; t_star).
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch

from emd_fast.diffusion.few_step import FewStepGenerator
from emd_fast.diffusion.generator import Generator
from emd_fast.teachers.diffusers import DiffusersDenoiser
from emd_fast.teachers.diffusers.architectures.conditions import GUIDANCE
from emd_fast.teachers.diffusers.scheduler import PREDICTIONS


class NoStockPipeline(ValueError):
    """No pipeline of diffusers makes these samples in one step. The message has the reason."""


def pipeline_class(denoiser: DiffusersDenoiser) -> str:
    """Returns the name of the stock pipeline that runs this network.

    Raises:
        NoStockPipeline: there is none for this network.
    """
    model, folder = denoiser.folder.model_class, denoiser.folder
    architecture = denoiser.network.architecture
    name = architecture.pipelines[0]
    if model == "UNet2DModel":
        if denoiser.num_classes:
            raise NoStockPipeline("no pipeline of diffusers gives labels to a UNet2DModel")
    elif folder.pipeline_class != name:
        raise NoStockPipeline(f"a {model} needs the other components of a {name}, which the teacher's folder is not")
    if architecture.returned != architecture.channels and not architecture.cuts_variance:
        raise NoStockPipeline(f"{name} does not cut a learned variance off")
    return name


def scheduler(generator: Generator | FewStepGenerator) -> Any:
    """Returns the diffusers scheduler with which the stock pipeline samples in one step.

    Raises:
        NoStockPipeline: there is none for this t_star and input_scale, or for several calls.
    """
    import diffusers

    if isinstance(generator, FewStepGenerator):
        raise NoStockPipeline(f"the configuration of a scheduler does not hold the {len(generator.times)} noise levels")
    denoiser = generator.denoiser
    assert isinstance(denoiser, DiffusersDenoiser)
    architecture = denoiser.network.architecture
    name, able = architecture.pipelines[0], architecture.schedulers
    t_star, scale = generator.t_star, generator.input_scale
    if denoiser.parametrization == "flow":
        if able != ("FlowMatchEulerDiscreteScheduler",):
            raise NoStockPipeline(f"{name} runs no rectified flow")
        if t_star != 1 or scale != 1:
            raise NoStockPipeline(
                f"{name} with one step starts at t = 1, not at t_star = {t_star:g} with input_scale = {scale:g}"
            )
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(denoiser.trained.index_scale))
    if able == ("FlowMatchEulerDiscreteScheduler",):
        raise NoStockPipeline(f"{name} runs nothing but rectified flows")
    betas = denoiser.trained.betas
    index = t_star * (len(betas) - 1)
    if abs(index - round(index)) > 1e-3:
        raise NoStockPipeline(
            f"t_star = {t_star:g} is index {index:g}, and schedulers know whole ones: use teacher.time(i)"
        )
    sigma = denoiser.schedule.sigma(torch.tensor([t_star])).item()
    if math.isclose(scale, 1.0, rel_tol=1e-6):
        chosen = able[0]
        options: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": True}
        if chosen == "CogVideoXDDIMScheduler":
            options["snr_shift_scale"] = 1.0  # the betas are those of the shifted chain
    elif math.isclose(scale, sigma, rel_tol=1e-6):
        chosen, options = "EulerDiscreteScheduler", {}
    else:
        raise NoStockPipeline(f"schedulers scale z by 1 or by sigma(t_star) = {sigma:g}, not by {scale:g}")
    if chosen not in able:
        raise NoStockPipeline(
            f"{name} takes z as it is, and input_scale is {scale:g}: train with input_scale = 1 to use it"
        )
    predicted = {ours: theirs for theirs, ours in PREDICTIONS.items()}[denoiser.parametrization]
    return getattr(diffusers, chosen)(
        num_train_timesteps=round(index) + 1,
        trained_betas=list(betas[: round(index) + 1]),
        timestep_spacing="trailing",
        prediction_type=predicted,
        steps_offset=1,  # without effect; other values cause a warning
        **options,
    )


def example(denoiser: DiffusersDenoiser, folder: str) -> str:
    """Lines of Python with which the stock pipeline samples an exported generator in one step.

    Args:
        folder: path of the exported folder.
    """
    import diffusers

    architecture = denoiser.network.architecture
    assert denoiser.sample_shape is not None
    taken = inspect.signature(getattr(diffusers, architecture.pipelines[0]).__call__).parameters
    frames, height, width = architecture.pixels(denoiser.sample_shape, denoiser.folder.vae_config())
    arguments = {"num_inference_steps": 1, **architecture.unguided}
    if GUIDANCE in architecture.takes.tensors:
        given = denoiser.embedded_guidance
        arguments["guidance_scale"] = architecture.guidance if given is None else given
    sizes = {"height": height, "width": width, "num_frames": frames}
    arguments |= {name: size for name, size in sizes.items() if name in taken}
    first = '"a cat", ' if "prompt" in taken else "[0], " if "class_labels" in taken else ""
    asked = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return (
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({folder!r})\n"
        f"made = pipeline({first}{asked}).{'frames' if architecture.video else 'images'}[0]"
    )
