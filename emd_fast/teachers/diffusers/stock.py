"""Schedulers with which stock pipelines of diffusers sample a generator of one or several calls.

A pipeline called with one inference step draws z ~ N(0, I), gets the timestep from its scheduler
and runs the network once. The chain of betas ends at the index of t_star and has "trailing"
spacing, so that the single timestep is that index. DDIM then computes D(z; t_star), the generator
with input_scale = 1. Euler multiplies z by sigma / alpha first and divides the network's input by
sqrt(1 + sigma^2 / alpha^2), which gives D(sigma z; t_star).

Several calls take their times from the arguments of the pipeline's call. LCM computes
alpha' (c_out D + c_skip x_t) + sigma' z, and FlowMatchEuler with stochastic_sampling computes
(1 - t') D + t' z: the sampler of a `FewStepGenerator` where c_skip = 0 and c_out = 1.
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

# LCM has c_skip = 1 / (1 + 4 (scaling * index)^2), which is 0 to rounding at every index but 0.
_LCM_SCALING = 1e9


class NoStockPipeline(ValueError):
    """No pipeline of diffusers makes these samples. The message has the reason."""


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
    """Returns the diffusers scheduler with which the stock pipeline makes the generator's samples.

    Raises:
        NoStockPipeline: there is none for these times and this input_scale.
    """
    denoiser = generator.denoiser
    assert isinstance(denoiser, DiffusersDenoiser)
    architecture = denoiser.network.architecture
    name, flows = architecture.pipelines[0], architecture.schedulers == ("FlowMatchEulerDiscreteScheduler",)
    if flows != (denoiser.parametrization == "flow"):
        raise NoStockPipeline(f"{name} runs {'nothing but rectified flows' if flows else 'no rectified flow'}")
    if isinstance(generator, FewStepGenerator):
        return _of_several_calls(generator, denoiser, name)
    return _flow_of_one_call(generator, denoiser, name) if flows else _chain_of_one_call(generator, denoiser, name)


def times_of(generator: Generator | FewStepGenerator) -> dict[str, Any]:
    """Arguments of the stock pipeline's call that say how many calls it makes, and at which noise levels."""
    if isinstance(generator, Generator):
        return {"num_inference_steps": 1}
    denoiser = generator.denoiser
    assert isinstance(denoiser, DiffusersDenoiser)
    if denoiser.parametrization == "flow":
        return {"sigmas": [_shortest(t) for t in generator.times]}
    return {"timesteps": [_index(t, denoiser) for t in generator.times]}


def _of_several_calls(generator: FewStepGenerator, denoiser: DiffusersDenoiser, name: str) -> Any:
    import diffusers

    (given,) = times_of(generator)
    if given not in _parameters(name):
        raise NoStockPipeline(f"{name} takes no {given}, by which it would get the {len(generator.times)} noise levels")
    if not math.isclose(generator.input_scale, 1.0, rel_tol=1e-6):
        raise NoStockPipeline(
            f"{name} takes z as it is, and input_scale is {generator.input_scale:g}: train with input_scale = 1 to "
            "use it"
        )
    if given == "sigmas":
        trained = int(denoiser.trained.index_scale)
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=trained, stochastic_sampling=True)
    indices = times_of(generator)[given]
    if not indices[-1]:
        raise NoStockPipeline("LCMScheduler returns its input at index 0: end the rungs above it")
    # The chain ends at the first call, and every index is on LCM's own list: it warns of others.
    return diffusers.LCMScheduler(
        num_train_timesteps=indices[0] + 1,
        original_inference_steps=indices[0] + 1,
        trained_betas=list(denoiser.trained.betas[: indices[0] + 1]),
        prediction_type=_prediction(denoiser),
        timestep_scaling=_LCM_SCALING,
        clip_sample=False,
    )


def _flow_of_one_call(generator: Generator, denoiser: DiffusersDenoiser, name: str) -> Any:
    import diffusers

    t_star, scale = generator.t_star, generator.input_scale
    if t_star != 1 or scale != 1:
        raise NoStockPipeline(
            f"{name} with one step starts at t = 1, not at t_star = {t_star:g} with input_scale = {scale:g}"
        )
    return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=int(denoiser.trained.index_scale))


def _chain_of_one_call(generator: Generator, denoiser: DiffusersDenoiser, name: str) -> Any:
    import diffusers

    able = denoiser.network.architecture.schedulers
    t_star, scale, betas = generator.t_star, generator.input_scale, denoiser.trained.betas
    index = _index(t_star, denoiser)
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
    return getattr(diffusers, chosen)(
        num_train_timesteps=index + 1,
        trained_betas=list(betas[: index + 1]),
        timestep_spacing="trailing",
        prediction_type=_prediction(denoiser),
        steps_offset=1,  # without effect; other values cause a warning
        **options,
    )


def _index(t: float, denoiser: DiffusersDenoiser) -> int:
    """The index of a time in the chain of betas.

    Raises:
        NoStockPipeline: it is between two.
    """
    index = t * (len(denoiser.trained.betas) - 1)
    if abs(index - round(index)) > 1e-3:
        raise NoStockPipeline(f"t = {t:g} is index {index:g}, and schedulers know whole ones: use teacher.time(i)")
    return round(index)


def _prediction(denoiser: DiffusersDenoiser) -> str:
    return {ours: theirs for theirs, ours in PREDICTIONS.items()}[denoiser.parametrization]


def _shortest(t: float) -> float:
    """The number of fewest digits that is t in float32."""
    import numpy as np

    return float(str(np.float32(t)))


def _parameters(pipeline: str) -> Any:
    import diffusers

    return inspect.signature(getattr(diffusers, pipeline).__call__).parameters


def arguments(generator: Generator | FewStepGenerator) -> dict[str, Any]:
    """Arguments of the stock pipeline's call besides prompts or labels: calls and their times, guidance, size."""
    denoiser = generator.denoiser
    assert isinstance(denoiser, DiffusersDenoiser) and denoiser.sample_shape is not None
    architecture = denoiser.network.architecture
    frames, height, width = architecture.pixels(denoiser.sample_shape, denoiser.folder.vae_config())
    found = {**times_of(generator), **architecture.unguided}
    if GUIDANCE in architecture.takes.tensors:
        given = denoiser.embedded_guidance
        found["guidance_scale"] = architecture.guidance if given is None else given
    taken = _parameters(architecture.pipelines[0])
    sizes = {"height": height, "width": width, "num_frames": frames}
    return found | {name: size for name, size in sizes.items() if name in taken}


def call(generator: Generator | FewStepGenerator) -> str:
    """The line of Python with which the stock pipeline samples the generator."""
    denoiser = generator.denoiser
    assert isinstance(denoiser, DiffusersDenoiser)
    architecture = denoiser.network.architecture
    taken = _parameters(architecture.pipelines[0])
    first = '"a cat", ' if "prompt" in taken else "[0], " if "class_labels" in taken else ""
    asked = ", ".join(f"{name}={value!r}" for name, value in arguments(generator).items())
    return f"made = pipeline({first}{asked}).{'frames' if architecture.video else 'images'}[0]"


def example(generator: Generator | FewStepGenerator, folder: str) -> str:
    """Lines of Python with which the stock pipeline samples an exported folder.

    Args:
        folder: its path.
    """
    return (
        "from diffusers import DiffusionPipeline\n"
        f"pipeline = DiffusionPipeline.from_pretrained({folder!r})\n"
        f"{call(generator)}"
    )
