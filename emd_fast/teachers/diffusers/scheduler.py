"""Schedule, parametrization and network times from the configuration of a scheduler of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emd_fast.diffusion.schedules import VP, RectifiedFlow, Schedule
from emd_fast.io import reading

_FLOW = "FlowMatchEulerDiscreteScheduler"
_CHAINS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "LMSDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
)
_MOST_STEPS = 2**20
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
# What diffusers puts in place of the last alpha^2 of a chain rescaled to zero terminal signal, where it needs one.
_LAST_ALPHA_SQUARED = 2.0**-24


@dataclass(frozen=True)
class Training:
    """How a network was trained: the schedule, what it predicts, and the factor from t to what it is told.

    A network of a chain of N betas is told the index (N - 1) t; one of a rectified flow is told N t.
    """

    schedule: Schedule
    parametrization: str
    index_scale: float
    betas: tuple[float, ...] = ()

    def index(self, t: Tensor) -> Tensor:
        return self.index_scale * t


def read(config: Mapping[str, Any]) -> Training:
    """Training by a scheduler_config.json.

    Raises:
        ValueError: a scheduler or a prediction type that is not supported, and what is.
    """
    import diffusers

    name = config.get("_class_name")
    if name == _FLOW:
        return Training(RectifiedFlow(), "flow", float(_steps(config)))
    if name not in _CHAINS:
        raise ValueError(f"the scheduler {name} is not supported: {', '.join((*_CHAINS, _FLOW))} are")
    for key, plain in (("timestep_type", "discrete"), ("use_flow_sigmas", False)):
        if config.get(key, plain) != plain:
            raise ValueError(f"a {name} with {key} = {config[key]!r} is not supported: {plain!r} is")
    prediction = config.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise ValueError(f"prediction_type {prediction!r} of {name} is not supported: {', '.join(PREDICTIONS)} are")
    # DDIM knows every kind of betas that the others know; what differs between the classes is how they sample.
    asked = (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "rescale_betas_zero_snr",
    )
    wanted = {key: config[key] for key in asked if key in config}
    _steps(config)
    try:
        chain: Any = diffusers.DDIMScheduler(**{"beta_schedule": "linear", **wanted})
        betas = _with_signal(chain.betas.double())
        schedule = VP(betas)
    except Exception as error:  # diffusers raises exceptions of many kinds
        raise ValueError(f"the scheduler {name} has no betas that can be used: {reading.reason(error)}") from None
    return Training(schedule, PREDICTIONS[prediction], float(len(betas) - 1), tuple(betas.tolist()))


def _steps(config: Mapping[str, Any]) -> int:
    """The number of training steps of a scheduler, which bounds its table of betas."""
    steps, betas = config.get("num_train_timesteps", 1000), config.get("trained_betas")
    if type(steps) is not int or not 1 < steps <= _MOST_STEPS:
        raise ValueError(f"num_train_timesteps must be a number from 2 to {_MOST_STEPS:,}, got {str(steps)[:100]}")
    if betas is not None and (type(betas) not in (list, tuple) or not 1 < len(betas) <= _MOST_STEPS):
        raise ValueError(f"trained_betas must be a list of 2 to {_MOST_STEPS:,} numbers")
    return steps


def _with_signal(betas: Tensor) -> Tensor:
    """betas, the last one so that some signal is left: log alpha has no value where a rescaled chain has none."""
    if betas[-1] < 1:
        return betas
    before = torch.prod(1 - betas[:-1])
    # Less than the index before has, which may be less than what diffusers puts there.
    last = torch.clamp(before / 4, max=_LAST_ALPHA_SQUARED)
    return torch.cat([betas[:-1], 1 - (last / before)[None]])
